#!/usr/bin/env bash
# Verifies the checksums of the weights in checkpoints/. They are part of the repository, so nothing
# is downloaded.
set -euo pipefail
PYTHON="not needed" source "$(dirname "${BASH_SOURCE[0]}")/scripts/python.sh"
cd "$ROOT/checkpoints"
if ! sha256sum --quiet --check SHA256SUMS; then
  echo "error: a shipped weight file is missing or damaged: clone the repository again" >&2
  exit 2
fi
echo "$(wc -l < SHA256SUMS) shipped weight files are complete."
