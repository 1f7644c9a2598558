#!/usr/bin/env bash
# Problem 3, called by the grader.
# Four arguments before the flags, edition 2025: samples an image for each line of prompt.json from
# its control image in SOURCE_DIR. CKPT is a file or folder of Stable Diffusion v1.4 (its ControlNet
# is then $CONTROLNET or checkpoints/controlnet_sd14), a ControlNet (its base model is then
# $SD_BASE), or the folder of the small model.
# Three arguments, edition 2024: samples 25 images of learned concepts for each prompt of input.json
# with the base model SD_CKPT.
set -euo pipefail
HELP_OF=p3_controlnet.inference
source "$(dirname "${BASH_SOURCE[0]}")/scripts/python.sh"
count=0
for argument in "$@"; do
  if [[ "$argument" == --* ]]; then break; fi
  if [ -z "$argument" ]; then count=0; break; fi
  count=$((count + 1))
done
if [ "$count" -eq 3 ]; then
  prompts="$1" out="$2" checkpoint="$3"
  shift 3
  exec "$PYTHON" -m p3_clip.personalisation.inference --prompts "$prompts" --output-dir "$out" \
    --checkpoint "$checkpoint" "$@"
fi
if [ "$count" -ne 4 ]; then
  echo "usage: bash hw2_3.sh prompt.json SOURCE_DIR OUT CKPT [flags of p3_controlnet.inference]," \
    "or bash hw2_3.sh input.json OUT SD_CKPT [flags of p3_clip.personalisation.inference]" >&2
  exit 2
fi
prompts="$1" sources="$2" out="$3" checkpoint="$4"
shift 4
exec "$PYTHON" -m p3_controlnet.inference --prompts "$prompts" --sources "$sources" \
  --output-dir "$out" --checkpoint "$checkpoint" "$@"
