#!/usr/bin/env bash
# Verifies the checksums of the weights in checkpoints/. They are part of the repository, so nothing
# is downloaded, unless CONTROLNET_URL names a zip file with a ControlNet for Stable Diffusion
# (docs/controlnet_sd14.md): it is unpacked to checkpoints/controlnet_sd14, where hw2_3.sh looks.
set -euo pipefail
CONTROLNET_URL="${CONTROLNET_URL:-}" # a direct link to a zip of config.json and the weights
PYTHON="not needed" source "$(dirname "${BASH_SOURCE[0]}")/scripts/python.sh"
cd "$ROOT/checkpoints"
if ! sha256sum --quiet --check SHA256SUMS; then
  echo "error: a shipped weight file is missing or damaged: clone the repository again" >&2
  exit 2
fi
echo "$(wc -l < SHA256SUMS) shipped weight files are complete."
if [ -n "$CONTROLNET_URL" ] && [ ! -e controlnet_sd14 ]; then
  part="$(mktemp -d controlnet_sd14.XXXXXX)"
  trap 'rm -rf "$part"' EXIT
  curl --fail --location --show-error --output "$part/zip" "$CONTROLNET_URL"
  python3 -m zipfile --extract "$part/zip" "$part/controlnet"
  if [ ! -f "$part/controlnet/config.json" ]; then
    echo "error: the zip of CONTROLNET_URL must hold config.json and the weights, in no folder" >&2
    exit 2
  fi
  mv "$part/controlnet" controlnet_sd14
  echo "checkpoints/controlnet_sd14 is downloaded."
fi
