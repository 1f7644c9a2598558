#!/usr/bin/env bash
# The study of personalisation on the small model: learns the drawn concepts by textual inversion and by Custom Diffusion (jointly, and
# apart and merged), then measures and draws. Finished trainings and pictures are kept. Flags go to every training, for example --steps.
# Scores are the small CLIP's, or those of $CLIP, a model folder or a name of open_clip. On pictures of 64x64 Custom Diffusion shows the
# photos in textual inversion's two views: at 0.4 of the size, which no word of the small model tells, little of a shape is left.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
runs="${RUNS_DIR:-$ROOT/runs}/personalisation"
base="${BASE:-$ROOT/checkpoints/ldm_shapes}"
clip="${CLIP:-$ROOT/checkpoints/clip_shapes}"
train() { # METHOD NAME FLAGS...
  local method="$1" name="$2"
  shift 2
  "$PYTHON" -m p3_clip.personalisation.train "$method" --run-dir "$runs/$name" --base "$base" --clip "$clip" "$@"
}
train textual-inversion inversion --steps 600 --batch-size 16 --warmup 50 "$@"
custom=(--augmentation flip --regular-dir "$runs/regular" --init-from "$runs/inversion/last" --steps 800 --lr 3e-4 --warmup 50)
train custom-diffusion joint "${custom[@]}" "$@"
apart=()
for concept in "wine <new1>" "mauve <new2>" "slate_star <new3>" "ring <new4>"; do
  read -r name token <<< "$concept"
  train custom-diffusion "$name" --drawn "$name" --tokens "$token" "${custom[@]}" "$@"
  apart+=("$runs/$name/last")
done
"$PYTHON" -m p3_clip.personalisation.merge --base "$base" --results "${apart[@]}" --output-dir "$runs/merged"
"$PYTHON" -m p3_clip.personalisation.study --base "$base" --inversion "$runs/inversion/last" --joint "$runs/joint/last" \
  --merged "$runs/merged" --output-dir "$runs/pictures" --clip "$clip"
"$PYTHON" -m p3_clip.personalisation.figures --pictures "$runs/pictures"
"$PYTHON" "$ROOT/scripts/make_report.py"
