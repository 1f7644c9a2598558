#!/usr/bin/env bash
# The ablations of Problem 1 in docs/experiments.md: trainings on equal numbers of images that
# differ in one setting each, then their table, results/p1_recipes.json. A training takes five
# minutes on two CPU cores with bf16 arithmetic; finished ones are kept.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
runs="${RUNS_DIR:-$ROOT/runs}/recipes"
data="${DIGITS:-$ROOT/hw2_data/digits}"
train() { # NAME FLAGS...
  local name="$1"
  shift
  bash "$ROOT/scripts/train_p1.sh" --run-dir "$runs/$name" --data "$data" --steps 500 \
    --batch-size 128 --gradient-accumulation-steps 2 --warmup 40 --lr-schedule cosine \
    --timesteps uniform --ema-decay 0.99 --log-every 50 --validate-every 250 \
    --preview-every 5000 --augment 0 --mixed-precision "${MIXED_PRECISION:-bf16}" "$@"
}
kept=(--lr 1e-2 --timesteps logit_normal)
train muon_learned_maps_logit "${kept[@]}"
train adamw_lr3e-3 "${kept[@]}" --optimizer adamw --lr 3e-3
train adamw_lr1e-3 "${kept[@]}" --optimizer adamw --lr 1e-3
train muon_lr3e-3 "${kept[@]}" --lr 3e-3
train no_maps "${kept[@]}" --model.no-class-maps
train augment "${kept[@]}" --augment 0.15
train x0 "${kept[@]}" --model.parameterization x0
train plain_loss "${kept[@]}" --loss-weight none
train muon_learned_maps --lr 1e-2
train muon_minsnr_maps --lr 1e-2 --loss-weight min_snr
"$PYTHON" -m p1_diffusion.study.sweeps recipes --data "$data" --runs "$runs"/*
