#!/usr/bin/env bash
# Learns one or several concepts jointly by Custom Diffusion (Problem 3, 2024). Running the same
# command again resumes. Flags are passed to p3_clip.personalisation.train, for example
# --drawn wine mauve, or --photos, --words and --base as in train_textual_inversion.sh.
set -euo pipefail
HELP_OF="p3_clip.personalisation.train custom-diffusion"
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m p3_clip.personalisation.train custom-diffusion \
  --run-dir "${RUNS_DIR:-$ROOT/runs}/custom_diffusion" "$@"
