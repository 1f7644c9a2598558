#!/usr/bin/env bash
# Serves the web demo on 127.0.0.1 (docs/demo.md). Makes the environment and installs the extra
# `demo` where missing. Flags are those of scripts/demo.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_extra demo
exec "$PYTHON" -m scripts.demo "$@"
