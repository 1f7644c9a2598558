#!/usr/bin/env bash
# Problem 2 for the grader: a face from every noise in NOISE_DIR, exactly as the homework's DDIM makes it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/python.sh"
if [ $# -lt 3 ] || [ -z "$1" ] || [ -z "$2" ] || [ -z "$3" ]; then
  echo "usage: bash hw2_2.sh NOISE_DIR OUT UNET.pt [flags of p2_ddim.inference]" >&2
  exit 2
fi
noises="$1" out="$2" checkpoint="$3"
shift 3
exec "$PYTHON" -m p2_ddim.inference --noises "$noises" --output-dir "$out" --checkpoint "$checkpoint" "$@"
