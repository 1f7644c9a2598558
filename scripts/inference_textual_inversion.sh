#!/usr/bin/env bash
# Samples images of learned concepts (Problem 3, 2024):
# inference_textual_inversion.sh input.json OUT [flags of p3_clip.personalisation.inference]
set -euo pipefail
HELP_OF=p3_clip.personalisation.inference
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
if [ $# -lt 2 ]; then
  echo "usage: bash scripts/inference_textual_inversion.sh input.json OUT" \
    "[flags, see .venv/bin/python -m p3_clip.personalisation.inference --help]" >&2
  exit 2
fi
prompts="$1" out="$2"
shift 2
exec "$PYTHON" -m p3_clip.personalisation.inference --prompts "$prompts" --output-dir "$out" "$@"
