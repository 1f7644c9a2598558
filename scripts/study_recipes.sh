#!/usr/bin/env bash
# The ablations behind docs/experiments.md: trainings of Problem 1 on equal numbers of images, one change at a time, then their
# table, results/p1_recipes.json. Some minutes a training on a CPU that multiplies bf16. The same command goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
runs="${RUNS_DIR:-$ROOT/runs}/recipes"
data="${DIGITS:-$ROOT/hw2_data/digits}"
train() {
  name="$1"
  shift
  bash "$ROOT/scripts/train_p1.sh" --run-dir "$runs/$name" --data "$data" --steps 780 --batch-size 128 --warmup 50 --lr-schedule cosine \
    --ema-decay 0.99 --validate-every 390 --preview-every 780 --augment 0 --mixed-precision "${MIXED_PRECISION:-no}" "$@"
}
adamw=(--optimizer adamw --lr 3e-3 --loss-weight min_snr)
muon=(--optimizer muon --lr 1e-2)
train adamw_lr1e-3 --optimizer adamw --lr 1e-3 --loss-weight min_snr
train adamw "${adamw[@]}"
train muon "${muon[@]}" --loss-weight min_snr
train muon_lr3e-3 --optimizer muon --lr 3e-3 --loss-weight min_snr
train muon_learned "${muon[@]}" --loss-weight learned
train muon_none "${muon[@]}" --loss-weight none
train muon_learned_logit_normal "${muon[@]}" --loss-weight learned --timesteps logit_normal
train muon_learned_augment "${muon[@]}" --loss-weight learned --augment 0.15
train muon_learned_x0 "${muon[@]}" --loss-weight learned --model.parameterization x0
"$PYTHON" -m p1_diffusion.study.sweeps recipes --data "$data" --runs "$runs"/*
