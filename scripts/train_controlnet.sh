#!/usr/bin/env bash
# Trains the ControlNet of circles (Problem 3, 2025). Running the same command again resumes. Flags
# are passed to p3_controlnet.train, for example --fill50k hw2_data/fill50k to mix in the real
# pairs, or --preset sd14 --base sd-v1-4.ckpt --fill50k hw2_data/fill50k for Stable Diffusion, whose
# run folder is runs/controlnet_sd14 instead of runs/controlnet_circles.
set -euo pipefail
HELP_OF=p3_controlnet.train
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
case " $* " in
  *" --preset sd14 "* | *" --preset=sd14 "*) name=controlnet_sd14 ;;
  *) name=controlnet_circles ;;
esac
exec "$PYTHON" -m p3_controlnet.train --run-dir "${RUNS_DIR:-$ROOT/runs}/$name" "$@"
