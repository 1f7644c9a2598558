#!/usr/bin/env bash
# Zero-shot classification of images by CLIP (Problem 3):
# inference_clip.sh IMAGES LABELS OUT [flags of p3_clip.inference]
set -euo pipefail
HELP_OF=p3_clip.inference
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
if [ $# -lt 3 ]; then
  echo "usage: bash scripts/inference_clip.sh IMAGES LABELS OUT" \
    "[flags, see .venv/bin/python -m p3_clip.inference --help]" >&2
  exit 2
fi
images="$1" labels="$2" out="$3"
shift 3
exec "$PYTHON" -m p3_clip.inference --images "$images" --labels "$labels" --output-dir "$out" "$@"
