#!/usr/bin/env bash
# Problem 1, called by the grader: samples the 500 digits of the edition 2025 into OUT, or the 1000
# of the edition 2024.
set -euo pipefail
EDITION=2025 # drawn if no year follows OUT; the graders give none, so for 2024 write 2024 here
HELP_OF=p1_diffusion.inference
source "$(dirname "${BASH_SOURCE[0]}")/scripts/python.sh"
if [ $# -lt 1 ] || [ -z "$1" ]; then
  echo "usage: bash hw2_1.sh OUT [2025|2024] [flags of p1_diffusion.inference]" >&2
  exit 2
fi
out="$1"
shift
case "${1:-}" in
  2024 | 2025) set -- --edition "$@" ;;
  *) if [[ " $* " != *" --edition"* ]]; then set -- --edition "$EDITION" "$@"; fi ;;
esac
exec "$PYTHON" -m p1_diffusion.inference --output-dir "$out" "$@"
