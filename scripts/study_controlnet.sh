#!/usr/bin/env bash
# Computes the studies, grades and figures of the report's ControlNet section, with the shipped
# small model. Flags are passed to the studies. If fill50k's real pairs are in hw2_data/fill50k (or
# $FILL50K), the studies of its testing pairs are included. Takes an hour on two CPU cores; finished
# rows are kept.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
data="${FILL50K:-$ROOT/hw2_data/fill50k}"
pairs=()
figures=(--only two_circles more_circles base canvas)  # the other figures need the real pairs
if [ -d "$data/testing" ]; then
  pairs=(--fill50k "$data")
  figures=("${pairs[@]}")
fi
for study in base two_circles canvas size; do "$PYTHON" -m p3_controlnet.study.sweeps "$study" "$@"; done
"$PYTHON" -m p3_controlnet.study.sweeps two_circles --control-text full "$@"
if [ ${#pairs[@]} -gt 0 ]; then
  for study in autoencoder circles; do
    "$PYTHON" -m p3_controlnet.study.sweeps "$study" "${pairs[@]}" "$@"
  done
  bash "$ROOT/hw2_3.sh" "$data/testing/prompt.json" "$data/testing/source" "$work/out" \
    "$ROOT/checkpoints/ldm_shapes"
  # Exit code 1 is a grade below the baseline; 2 is an error.
  bash "$ROOT/scripts/grade.sh" "$work/out" "$data/testing/prompt.json" "$data/testing/source" \
    "$data/testing/target" --resolution 128 \
    --result "$ROOT/results/p3_controlnet_evaluation.json" || [ $? -eq 1 ]
fi
"$PYTHON" -m p3_controlnet.study.figures --output-dir "$ROOT/results/figures/p3_controlnet" \
  "${figures[@]}"
"$PYTHON" -m scripts.make_frames --only p3_control_scale p3_control_image p3_without_control
"$PYTHON" -m scripts.make_report
