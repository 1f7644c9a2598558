#!/usr/bin/env bash
# Learns words for concepts by textual inversion (Problem 3, 2024); the same command resumes. Flags go to p3_clip.personalisation.train,
# for example --base sd-v1-4.ckpt --photos hw2_data/textual_inversion/0 --words dog; without photos the drawn concepts are learned.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m p3_clip.personalisation.train textual-inversion --run-dir "${RUNS_DIR:-$ROOT/runs}/textual_inversion" "$@"
