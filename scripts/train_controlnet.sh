#!/usr/bin/env bash
# Trains the ControlNet of circles (Problem 3, 2025). Running the same command again resumes. Flags
# are passed to p3_controlnet.train, for example --fill50k hw2_data/fill50k to mix in the real
# pairs, or --base FOLDER for another base model.
set -euo pipefail
HELP_OF=p3_controlnet.train
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m p3_controlnet.train --run-dir "${RUNS_DIR:-$ROOT/runs}/controlnet_circles" "$@"
