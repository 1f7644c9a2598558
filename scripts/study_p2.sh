#!/usr/bin/env bash
# Computes the studies and figures of Problem 2's section of the report, with the shipped face
# model. Flags are passed to p2_ddim.study.sweeps. If photos are in hw2_data/face/photos (or
# $FACES/photos), distances to them are included. The speed of the full-size network is not measured
# here but by scripts/benchmark_p2.py, beside which no other program should run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
faces="${FACES:-$ROOT/hw2_data/face}"
photos=()
if [ -d "$faces/photos" ]; then photos=(--photos "$faces"); fi
"$PYTHON" -m scripts.make_noise --output-dir "$work/noise"
"$PYTHON" -m scripts.make_noise --output-dir "$work/many" --count 480 --seed 1
"$PYTHON" -m p2_ddim.inference --noises "$work/many" --output-dir "$work/faces" --chunk-size 16 \
  --no-stretch
"$PYTHON" -m p2_ddim.study.figures --noises "$work/noise" \
  --output-dir "$ROOT/results/figures/p2" --images "$work/faces"
"$PYTHON" -m p2_ddim.study.sweeps steps "$@"
if [ ${#photos[@]} -eq 0 ]; then
  echo "the studies eta and paths and the evaluation compare with photos, which are not in $faces:" \
    "their results stay as they are" >&2
else
  for study in eta paths; do
    "$PYTHON" -m p2_ddim.study.sweeps "$study" "${photos[@]}" "$@"
  done
  "$PYTHON" -m p2_ddim.evaluate --images "$work/faces" "${photos[@]}" \
    --result "$ROOT/results/p2_faces.json"
  if [ -d "$ROOT/checkpoints/p2_features" ]; then
    "$PYTHON" -m p2_ddim.study.evaluate_features "${photos[@]}" \
      --result "$ROOT/results/p2_features.json"
  fi
fi
"$PYTHON" -m scripts.make_frames --only p2_eta p2_interpolation p2_steps
"$PYTHON" -m scripts.make_report
