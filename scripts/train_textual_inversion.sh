#!/usr/bin/env bash
# Learns token embeddings of concepts by textual inversion (Problem 3, 2024). Running the same
# command again resumes. Flags are passed to p3_clip.personalisation.train, for example
# --base sd-v1-4.ckpt --photos hw2_data/textual_inversion/0 --words dog. Default: the drawn
# concepts.
set -euo pipefail
HELP_OF="p3_clip.personalisation.train textual-inversion"
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m p3_clip.personalisation.train textual-inversion \
  --run-dir "${RUNS_DIR:-$ROOT/runs}/textual_inversion" "$@"
