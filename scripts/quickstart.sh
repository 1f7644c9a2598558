#!/usr/bin/env bash
# From a fresh clone to pictures: makes the environment, runs a problem on the shipped weights, makes its figures.
set -euo pipefail
job="${1:-p1}"
usage="usage: bash scripts/quickstart.sh [p1|controlnet|all] [OUT]"
small="$(dirname "${BASH_SOURCE[0]}")/../checkpoints/ldm_shapes"
case "$job" in
  p1 | all) ;;
  controlnet)
    if [ ! -d "$small" ]; then
      echo "error: checkpoints/ldm_shapes is not there: no weights of the small model are shipped yet" >&2
      exit 2
    fi
    ;;
  *) echo "error: unknown job $job; $usage" >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
out="${2:-$ROOT/outputs}"

if [ "$job" = p1 ] || [ "$job" = all ]; then
  echo "Problem 1: 500 digits in the grader's layout, graded by the project's classifier, and the report's figures."
  bash "$ROOT/hw2_1.sh" "$out/p1"
  bash "$ROOT/scripts/grade.sh" "$out/p1" || [ $? -eq 1 ]  # 1 is a grade below the bar, not a failure to grade
  "$PYTHON" -m p1_diffusion.figures --images "$out/p1" --output-dir "$out/p1_figures"
  echo "Look at $out/p1_figures/grid_mixed.png and $out/p1_figures/reverse_2025.png; the digits are in $out/p1."
fi

if [ "$job" = controlnet ] || { [ "$job" = all ] && [ -d "$small" ]; }; then
  echo "Problem 3, 2025: 25 control pictures like the course's and 20 with two circles, drawn, graded and shown."
  data="$out/controlnet_data"
  "$PYTHON" "$ROOT/scripts/make_circles.py" --output-dir "$data"
  bash "$ROOT/hw2_3.sh" "$data/prompt.json" "$data/source" "$out/controlnet" "$ROOT/checkpoints/ldm_shapes"
  bash "$ROOT/scripts/grade.sh" "$out/controlnet" "$data/prompt.json" "$data/source" "$data/target" --resolution 64 --clip none \
    || [ $? -eq 1 ]
  "$PYTHON" -m p3_controlnet.figures --output-dir "$out/controlnet_figures" --data "$data" --images "$out/controlnet" \
    --rows 45 --only circles failures
  echo "Look at $out/controlnet_figures/circles.png and $out/controlnet_figures/failures.png; the pictures are in $out/controlnet."
elif [ "$job" = all ]; then
  echo "Problem 3 is left out: no weights of the small model are shipped yet."
fi
