#!/usr/bin/env bash
# The study of personalisation with the small model. Learns the drawn concepts by textual inversion
# and by joint Custom Diffusion, each with and without cut-mix, the latter also with collages, a loss
# weighted to the objects and one on the attention; and by Custom Diffusion one by one, merged
# afterwards; then measures the results and makes the figures. Estimated: five hours on one CPU core.
# Finished trainings and images are kept. Flags are passed to every training, for example --steps.
# Scores are those of the small CLIP, or of $CLIP, a model folder or a model name of open_clip.
# The photos have plain backgrounds and no word of the small model describes a size, so views are
# whole or smaller with a continued background (--augmentation shrink). Custom Diffusion is
# regularised by drawn scenes, which hold no mistakes of the base (--class-images drawn).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
runs="${RUNS_DIR:-$ROOT/runs}/personalisation"
base="${BASE:-$ROOT/checkpoints/ldm_shapes}"
clip="${CLIP:-$ROOT/checkpoints/clip_shapes}"
train() { # METHOD NAME FLAGS...
  local method="$1" name="$2"
  shift 2
  "$PYTHON" -m p3_clip.personalisation.train "$method" --run-dir "$runs/$name" --base "$base" \
    --clip "$clip" --warmup 50 "$@"
}
photos=(--drawn-photos 10 --augmentation shrink --vectors 3 --timesteps shifted)
custom=("${photos[@]}" --class-images drawn --num-class-images 1000 --lr 2e-3)
joint=("${custom[@]}" --steps 6000 --validate-every 1000 --preview-every 1000
  --checkpoint-every 500)
inversion=("${photos[@]}" --steps 600 --batch-size 16)
train textual-inversion inversion "${inversion[@]}" "$@"
train textual-inversion inversion_cut_mix "${inversion[@]}" --cut-mix 4 "$@"
train custom-diffusion joint "${joint[@]}" "$@"
train custom-diffusion joint_cut_mix "${joint[@]}" --cut-mix 4 "$@"
train custom-diffusion joint_collage "${joint[@]}" --cut-mix 4 --collage 240 --object-weight 3 \
  --attention-weight 0.1 "$@"
apart=()
for concept in "wine <new1>" "mauve <new2>" "slate_triangle <new3>" "ring <new4>"; do
  read -r name token <<< "$concept"
  train custom-diffusion "$name" --drawn "$name" --tokens "$token" "${custom[@]}" --steps 600 \
    --validate-every 200 --preview-every 200 --checkpoint-every 200 "$@"
  apart+=("$runs/$name/last")
done
"$PYTHON" -m p3_clip.personalisation.merge --base "$base" --results "${apart[@]}" \
  --output-dir "$runs/merged"
"$PYTHON" -m p3_clip.personalisation.study.sweeps --base "$base" \
  --inversion "$runs/inversion/last" --inversion-cut-mix "$runs/inversion_cut_mix/last" \
  --joint "$runs/joint/last" --joint-cut-mix "$runs/joint_cut_mix/last" \
  --joint-collage "$runs/joint_collage/last" \
  --merged "$runs/merged" --output-dir "$runs/pictures" --clip "$clip"
"$PYTHON" -m p3_clip.personalisation.study.figures --pictures "$runs/pictures"
"$PYTHON" -m scripts.make_report
