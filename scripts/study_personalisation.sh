#!/usr/bin/env bash
# The study of personalisation on the small model: learns the drawn concepts by textual inversion and by Custom Diffusion, each with and
# without cut-mix, and by Custom Diffusion apart and merged; then measures and draws. Two hours on one CPU core with --mixed-precision bf16.
# Finished trainings and pictures are kept. Flags go to every training, for example --steps. Scores are the small CLIP's, or those of $CLIP,
# a model folder or a name of open_clip. On pictures of 64x64 Custom Diffusion shows the photos in textual inversion's two views: at 0.4 of
# the size, which no word of the small model tells, little of a shape is left.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
runs="${RUNS_DIR:-$ROOT/runs}/personalisation"
base="${BASE:-$ROOT/checkpoints/ldm_shapes}"
clip="${CLIP:-$ROOT/checkpoints/clip_shapes}"
train() { # METHOD NAME FLAGS...
  local method="$1" name="$2"
  shift 2
  "$PYTHON" -m p3_clip.personalisation.train "$method" --run-dir "$runs/$name" --base "$base" --clip "$clip" --warmup 50 "$@"
}
inversion=(--steps 600 --batch-size 16)
custom=(--augmentation flip --class-data-dir "$runs/class_data" --init-from "$runs/inversion/last" --lr 5e-4)
train textual-inversion inversion "${inversion[@]}" "$@"
train textual-inversion inversion_cut_mix "${inversion[@]}" --cut-mix 4 "$@"
train custom-diffusion joint "${custom[@]}" --steps 2500 --validate-every 1000 --preview-every 1000 --checkpoint-every 500 "$@"
train custom-diffusion joint_cut_mix "${custom[@]}" --cut-mix 4 --steps 2500 --validate-every 1000 --preview-every 1000 \
  --checkpoint-every 500 "$@"
apart=()
for concept in "wine <new1>" "mauve <new2>" "slate_triangle <new3>" "ring <new4>"; do
  read -r name token <<< "$concept"
  train custom-diffusion "$name" --drawn "$name" --tokens "$token" "${custom[@]}" --steps 400 --validate-every 200 --preview-every 200 \
    --checkpoint-every 200 "$@"
  apart+=("$runs/$name/last")
done
"$PYTHON" -m p3_clip.personalisation.merge --base "$base" --results "${apart[@]}" --output-dir "$runs/merged"
"$PYTHON" -m p3_clip.personalisation.study.sweeps --base "$base" --inversion "$runs/inversion/last" \
  --inversion-cut-mix "$runs/inversion_cut_mix/last" --joint "$runs/joint/last" --joint-cut-mix "$runs/joint_cut_mix/last" \
  --merged "$runs/merged" --output-dir "$runs/pictures" --clip "$clip"
"$PYTHON" -m p3_clip.personalisation.study.figures --pictures "$runs/pictures"
"$PYTHON" -m scripts.make_report
