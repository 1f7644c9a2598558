#!/usr/bin/env bash
# Computes the results of Problem 1's section of the report: grades of both editions, figures,
# guidance sweep and samplers. Takes about an hour on two CPU cores; finished rows are kept. Needs
# the real digits in hw2_data/digits (or $DIGITS).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
data="${DIGITS:-$ROOT/hw2_data/digits}"
for edition in 2025 2024; do
  bash "$ROOT/hw2_1.sh" "$work/$edition" "$edition"
  "$PYTHON" -m p1_diffusion.evaluate --images "$work/$edition" --data "$data" \
    --result "$ROOT/results/p1_evaluation_$edition.json" || [ $? -eq 1 ]
done
"$PYTHON" -m p1_diffusion.study.figures --images "$work/2024" \
  --output-dir "$ROOT/results/figures/p1"
"$PYTHON" -m p1_diffusion.study.sweeps guidance
"$PYTHON" -m p1_diffusion.study.sweeps samplers
"$PYTHON" -m scripts.make_frames --only p1_reverse p1_guidance p1_steps
"$PYTHON" -m scripts.make_report
