#!/usr/bin/env bash
# Does each circle get its own colour? study_binding.sh [BASE [CONTROLNET]] [flags of the studies]
# Draws two, three and touching circles, circles of all sizes, and prompts without a ControlNet, and
# measures shapes and colours from the pixels: once with a ControlNet that reads the full prompt and
# once with one that reads the empty one. BASE and CONTROLNET are files or
# folders, Stable Diffusion's included; by default the shipped small ones. The results are
# p3_controlnet_base.json and p3_controlnet_two_circles.json in results/ or in the folder that
# --results names. Takes 20 minutes on two CPU cores with the small model; finished rows are kept.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
models=()
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then models+=(--checkpoint "$1"); shift; fi
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then models+=(--control "$1"); shift; fi
study() { "$PYTHON" -m p3_controlnet.study.sweeps "$@"; }
study base --default-only ${models[@]+"${models[@]}"} "$@"
for text in full empty; do
  study two_circles --control-text "$text" ${models[@]+"${models[@]}"} "$@"
done
