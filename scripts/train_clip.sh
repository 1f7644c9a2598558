#!/usr/bin/env bash
# Trains the small CLIP of coloured shapes (Problem 3). Running the same command again resumes. The
# real pairs of hw2_data/fill50k are mixed in if they exist. Flags are passed to p3_clip.train. The
# result is RUNS_DIR/clip_shapes/last; checkpoints/clip_shapes was made in this way.
set -euo pipefail
HELP_OF=p3_clip.train
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
if [ -d "$ROOT/hw2_data/fill50k" ] && [[ " $* " != *" --fill50k"* ]]; then
  set -- --fill50k "$ROOT/hw2_data/fill50k" "$@"
fi
exec "$PYTHON" -m p3_clip.train --run-dir "${RUNS_DIR:-$ROOT/runs}/clip_shapes" "$@"
