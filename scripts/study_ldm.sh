#!/usr/bin/env bash
# What the noise schedule, the prediction and the latents' normalisation give the small latent-diffusion model: four U-Nets trained briefly
# from scratch that differ in one choice each, then measured as in study_controlnet.sh. About an hour on two CPU cores; flags go to the
# trainings, for example --mixed-precision bf16. The same command resumes. Kept in RUNS_DIR/short.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
runs="${RUNS_DIR:-$ROOT/runs}/short"
base="$ROOT/checkpoints/ldm_shapes"
train() { # NAME FLAGS...
  local name="$1"
  shift
  "$PYTHON" -m p3_controlnet.base.train_unet --run-dir "$runs/$name" --autoencoder "$base/vae" --text-encoder "$base/text_encoder" \
    --pictures 20000 --steps 1500 --warmup 100 "$@"
  "$PYTHON" -m p3_controlnet.study.sweeps base --checkpoint "$runs/$name/last" --default-only
}
train usual "$@"
train plain_schedule --no-zero-terminal "$@"
train plain_schedule_eps --no-zero-terminal --parameterization eps --snr-offset 0 "$@"
train one_factor --no-channelwise "$@"
"$PYTHON" -m scripts.make_report
