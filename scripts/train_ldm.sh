#!/usr/bin/env bash
# Trains the small latent-diffusion model (Problem 3):
# train_ldm.sh [autoencoder|text|unet] [flags of p3_controlnet.base.train_*]
# The first argument selects one part. Without it all three are trained, and flags are passed to
# each, but --fill50k FOLDER only to autoencoder and U-Net; the text encoder comes first, so a flag
# that not all have is refused at once. Running the same command again resumes.
# RUNS_DIR/ldm_unet/last is the whole model.
set -euo pipefail
case "${1:-}" in
  autoencoder | text | unet) HELP_OF="p3_controlnet.base.train_$1" ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
runs="${RUNS_DIR:-$ROOT/runs}"
part=all
case "${1:-}" in
  autoencoder | text | unet) part="$1"; shift ;;
esac
if [ "$part" = all ] || [ "$part" = text ]; then
  text=() value_follows=""
  for argument in "$@"; do
    if [ -n "$value_follows" ]; then
      value_follows=""
    elif [ "$part" = all ] && [ "$argument" = --fill50k ]; then
      value_follows=1
    elif [ "$part" = text ] || [[ "$argument" != --fill50k=* ]]; then
      text+=("$argument")
    fi
  done
  "$PYTHON" -m p3_controlnet.base.train_text --run-dir "$runs/ldm_text" ${text[@]+"${text[@]}"}
fi
if [ "$part" = all ] || [ "$part" = autoencoder ]; then
  "$PYTHON" -m p3_controlnet.base.train_autoencoder --run-dir "$runs/ldm_autoencoder" "$@"
fi
if [ "$part" = all ] || [ "$part" = unet ]; then
  "$PYTHON" -m p3_controlnet.base.train_unet --run-dir "$runs/ldm_unet" \
    --autoencoder "$runs/ldm_autoencoder/last" --text-encoder "$runs/ldm_text/last" "$@"
fi
