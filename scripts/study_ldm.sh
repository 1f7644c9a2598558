#!/usr/bin/env bash
# Ablations of the small latent-diffusion model: noise schedule, parameterization and normalisation
# of the latents. Trains four U-Nets from scratch for 1,500 steps, each with one choice changed, and
# measures them as study_controlnet.sh does. Takes about an hour on two CPU cores. Flags are passed
# to the trainings, for example --mixed-precision bf16. Running the same command again resumes. The
# runs are kept in RUNS_DIR/short.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
runs="${RUNS_DIR:-$ROOT/runs}/short"
base="$ROOT/checkpoints/ldm_shapes"
train() { # NAME FLAGS...
  local name="$1"
  shift
  "$PYTHON" -m p3_controlnet.base.train_unet --run-dir "$runs/$name" --autoencoder "$base/vae" \
    --text-encoder "$base/text_encoder" --pictures 20000 --steps 1500 \
    --batch-size 16 --warmup 100 "$@"
  "$PYTHON" -m p3_controlnet.study.sweeps base --checkpoint "$runs/$name/last" --default-only
}
train usual "$@"
train plain_schedule --no-zero-terminal "$@"
train plain_schedule_eps --no-zero-terminal --parameterization eps "$@"
train one_factor --no-channelwise "$@"
"$PYTHON" -m scripts.make_report
