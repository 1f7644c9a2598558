#!/usr/bin/env bash
# Writes checkpoints/SHA256SUMS, which hw2_download_ckpt.sh verifies. Run it after changing a weight
# file in checkpoints/.
set -euo pipefail
PYTHON="not needed" source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
cd "$ROOT/checkpoints"
find . -name '*.safetensors' -printf '%P\n' | LC_ALL=C sort |
  xargs -r -d '\n' sha256sum > SHA256SUMS
cat SHA256SUMS
