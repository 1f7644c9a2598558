#!/usr/bin/env bash
# Kills each trainer and each drawing program by SIGKILL and SIGTERM at random moments, 20 times
# each, runs each again to the end and compares what it leaves with an undisturbed run. Writes
# results/faults.json. Takes two hours on two CPU cores; it goes on where it was interrupted.
set -euo pipefail
HELP_OF=scripts.study_faults
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m scripts.study_faults "$@"
