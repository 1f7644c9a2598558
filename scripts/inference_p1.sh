#!/usr/bin/env bash
# Samples digits into OUT/{mnistm,svhn} (Problem 1):
# inference_p1.sh OUT [flags of p1_diffusion.inference]
set -euo pipefail
HELP_OF=p1_diffusion.inference
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
if [ $# -lt 1 ]; then
  echo "usage: bash scripts/inference_p1.sh OUT" \
    "[flags, see .venv/bin/python -m p1_diffusion.inference --help]" >&2
  exit 2
fi
exec "$PYTHON" -m p1_diffusion.inference --output-dir "$@"
