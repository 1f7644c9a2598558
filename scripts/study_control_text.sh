#!/usr/bin/env bash
# What makes two circles take two colours? Trains four ControlNets briefly, 600 steps each: with
# the full prompt or the empty one as the ControlNet's text, and on pictures of one circle or with
# two and three circles in 40 % of them. Measures each as study_binding.sh does. Takes an estimated
# 75 minutes on two CPU cores. Flags are passed to the trainings, for example --fill50k FOLDER.
# Running the same command again resumes. The base model is the shipped small one or $BASE; the runs
# are kept in RUNS_DIR/short.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
runs="${RUNS_DIR:-$ROOT/runs}/short"
base="${BASE:-$ROOT/checkpoints/ldm_shapes}"
for text in full empty; do
  for several in 0 0.4; do
    name="control_${text}_$([ "$several" = 0 ] && echo one || echo several)"
    "$PYTHON" -m p3_controlnet.train --run-dir "$runs/$name" --base "$base" --control-text "$text" \
      --several-fraction "$several" --steps 600 --warmup 100 "$@"
    "$PYTHON" -m p3_controlnet.study.sweeps two_circles --checkpoint "$base" \
      --control "$runs/$name/last"
  done
done
"$PYTHON" -m scripts.make_report
