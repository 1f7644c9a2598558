#!/usr/bin/env bash
# Trains the small latent-diffusion model (Problem 3): train_ldm.sh [autoencoder|unet] [flags of p3_controlnet.base.train_*]
# Without a part the autoencoder comes first and then the U-Net, and flags go to both, for example --fill50k hw2_data/fill50k.
# The same command resumes. RUNS_DIR/ldm_unet/last is the whole model.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
runs="${RUNS_DIR:-$ROOT/runs}"
part=both
case "${1:-}" in
  autoencoder | unet) part="$1"; shift ;;
esac
if [ "$part" != unet ]; then
  "$PYTHON" -m p3_controlnet.base.train_autoencoder --run-dir "$runs/ldm_autoencoder" "$@"
fi
if [ "$part" != autoencoder ]; then
  "$PYTHON" -m p3_controlnet.base.train_unet --run-dir "$runs/ldm_unet" --autoencoder "$runs/ldm_autoencoder/last" "$@"
fi
