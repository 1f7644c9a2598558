#!/usr/bin/env bash
# Samples a face from each noise in NOISE_DIR into OUT (Problem 2):
# inference_p2.sh NOISE_DIR OUT [flags of p2_ddim.inference]
set -euo pipefail
HELP_OF=p2_ddim.inference
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
if [ $# -lt 2 ]; then
  echo "usage: bash scripts/inference_p2.sh NOISE_DIR OUT" \
    "[flags, see .venv/bin/python -m p2_ddim.inference --help]" >&2
  exit 2
fi
exec "$PYTHON" -m p2_ddim.inference --noises "$1" --output-dir "$2" "${@:3}"
