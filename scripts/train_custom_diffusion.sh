#!/usr/bin/env bash
# Learns concepts by Custom Diffusion, several ones jointly (Problem 3, 2024); the same command resumes. Flags go to
# p3_clip.personalisation.train, for example --drawn wine mauve, or --photos, --words and --base as for textual inversion.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
exec "$PYTHON" -m p3_clip.personalisation.train custom-diffusion --run-dir "${RUNS_DIR:-$ROOT/runs}/custom_diffusion" "$@"
