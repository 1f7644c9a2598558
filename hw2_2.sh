#!/usr/bin/env bash
# Problem 2, called by the grader: samples a face from each noise in NOISE_DIR, with the homework's
# DDIM. Default of UNET.pt: the shipped face model, which needs 64x64 noises (scripts/make_noise.py
# writes some).
set -euo pipefail
HELP_OF=p2_ddim.inference
source "$(dirname "${BASH_SOURCE[0]}")/scripts/python.sh"
if [ $# -lt 2 ] || [ -z "$1" ] || [ -z "$2" ] || [ -z "${3-default}" ]; then
  echo "usage: bash hw2_2.sh NOISE_DIR OUT [UNET.pt] [flags of p2_ddim.inference]" >&2
  exit 2
fi
noises="$1" out="$2"
shift 2
case "${1:---}" in
  --*) ;;
  *) set -- --checkpoint "$@" ;;
esac
exec "$PYTHON" -m p2_ddim.inference --noises "$noises" --output-dir "$out" "$@"
