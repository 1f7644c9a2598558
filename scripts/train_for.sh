#!/usr/bin/env bash
# Trains for a given time instead of a number of steps:
# scripts/train_for.sh p1|p2 MINUTES [flags of the trainer].
# The learning rate is constant for four fifths of the time; then it falls to 0 over a quarter as
# many steps again. Running the same command again resumes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
case "${1:-}" in
  p1) name=p1_digits ;;  # the run folders of train_p1.sh and train_p2.sh
  p2) name=p2_faces ;;
  *) name="" ;;
esac
if [ -z "$name" ] || ! [[ "${2:-}" =~ ^[0-9]+([.][0-9]+)?$ ]]; then
  echo "usage: scripts/train_for.sh p1|p2 MINUTES [flags of the trainer but --run-dir]" >&2
  exit 2
fi
problem="$1" minutes="$2"
shift 2
run_dir="${RUNS_DIR:-$ROOT/runs}/$name"
train=(bash "$ROOT/scripts/train_$problem.sh" --run-dir "$run_dir" --lr-schedule constant "$@")
if [ ! -f "$run_dir/cooling" ]; then
  seconds="$("$PYTHON" -c 'import sys; print(float(sys.argv[1]) * 48)' "$minutes")"
  code=0
  timeout --foreground --signal=TERM "$seconds" "${train[@]}" --steps 100000000 || code=$?
  [ "$code" -eq 124 ] || exit "$code"
  steps=0
  if [ -f "$run_dir/state.safetensors" ]; then
    steps="$("$PYTHON" - "$run_dir/state.safetensors" <<'PYTHON'
import sys
from pathlib import Path

from common.checkpoint import load_tensors

print(load_tensors(Path(sys.argv[1]))[1]["step"] * 5 // 4)
PYTHON
)"
  fi
  if [ "$steps" -eq 0 ]; then
    echo "error: $minutes minutes ended before the first step: give more" >&2
    exit 2
  fi
  echo "$steps" > "$run_dir/cooling"
fi
exec "${train[@]}" --steps "$(cat "$run_dir/cooling")"
