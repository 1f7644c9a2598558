#!/usr/bin/env bash
# Trains the small CLIP of coloured shapes (Problem 3); the same command resumes. Flags go to p3_clip.train, for example
# --fill50k hw2_data/fill50k to mix in the real pairs. RUNS_DIR/clip_shapes/last is what checkpoints/clip_shapes ships.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m p3_clip.train --run-dir "${RUNS_DIR:-$ROOT/runs}/clip_shapes" "$@"
