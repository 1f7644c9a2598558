#!/usr/bin/env bash
# Trains the small latent-diffusion model (Problem 3):
# train_ldm.sh [autoencoder|text|unet] [flags of p3_controlnet.base.train_*]
# The first argument selects one part. Without it all three are trained in this order, and flags,
# for example --fill50k hw2_data/fill50k, are passed to the trainings of autoencoder and U-Net only.
# Running the same command again resumes. RUNS_DIR/ldm_unet/last is the whole model.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
runs="${RUNS_DIR:-$ROOT/runs}"
part=all
case "${1:-}" in
  autoencoder | text | unet) part="$1"; shift ;;
esac
if [ "$part" = all ] || [ "$part" = autoencoder ]; then
  "$PYTHON" -m p3_controlnet.base.train_autoencoder --run-dir "$runs/ldm_autoencoder" "$@"
fi
if [ "$part" = all ]; then
  "$PYTHON" -m p3_controlnet.base.train_text --run-dir "$runs/ldm_text"
elif [ "$part" = text ]; then
  "$PYTHON" -m p3_controlnet.base.train_text --run-dir "$runs/ldm_text" "$@"
fi
if [ "$part" = all ] || [ "$part" = unet ]; then
  "$PYTHON" -m p3_controlnet.base.train_unet --run-dir "$runs/ldm_unet" \
    --autoencoder "$runs/ldm_autoencoder/last" --text-encoder "$runs/ldm_text/last" "$@"
fi
