#!/usr/bin/env bash
# Samples images from prompts and control images (Problem 3, 2025):
# inference_controlnet.sh prompt.json SOURCES OUT [flags of p3_controlnet.inference]
set -euo pipefail
HELP_OF=p3_controlnet.inference
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
if [ $# -lt 3 ]; then
  echo "usage: bash scripts/inference_controlnet.sh prompt.json SOURCES OUT" \
    "[flags, see .venv/bin/python -m p3_controlnet.inference --help]" >&2
  exit 2
fi
prompts="$1" sources="$2" out="$3"
shift 3
exec "$PYTHON" -m p3_controlnet.inference --prompts "$prompts" --sources "$sources" \
  --output-dir "$out" "$@"
