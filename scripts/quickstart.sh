#!/usr/bin/env bash
# From a fresh clone to pictures: makes the environment, runs a problem on the shipped weights, makes its figures.
# A job is a name in `jobs`, the weights that it needs in `weights_of`, and a function `run_NAME`.
set -euo pipefail
jobs=(p1 p2 clip controlnet personalisation)
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

weights_of() {  # the folders in checkpoints/ without which the job cannot run
  case "$1" in
    p1) echo p1_digits ;;
    p2) echo p2_faces ;;
    clip) echo clip_shapes ;;
    controlnet) echo ldm_shapes ;;
    personalisation) echo ldm_shapes concepts_shapes ;;
  esac
}

missing_of() {  # the first of them that is not there, if one is not
  local folder
  for folder in $(weights_of "$1"); do
    if [ ! -d "$here/checkpoints/$folder" ]; then echo "$folder"; return; fi
  done
}

run_p1() {
  echo "Problem 1: 500 digits in the grader's layout, graded by the project's classifier, and the report's figures."
  bash "$ROOT/hw2_1.sh" "$out/p1"
  bash "$ROOT/scripts/grade.sh" "$out/p1" || [ $? -eq 1 ]  # 1 is a grade below the bar, not a failure to grade
  "$PYTHON" -m p1_diffusion.study.figures --images "$out/p1" --output-dir "$out/p1_figures"
  echo "Look at $out/p1_figures/grid_mixed.png and $out/p1_figures/reverse_2025.png; the digits are in $out/p1."
}

run_p2() {
  echo "Problem 2: ten faces from fixed noises by DDIM, what fresh noise does to four of them, and the paths between two."
  "$PYTHON" -m scripts.make_noise --output-dir "$out/p2_noise"
  bash "$ROOT/hw2_2.sh" "$out/p2_noise" "$out/p2"
  "$PYTHON" -m p2_ddim.study.figures --noises "$out/p2_noise" --output-dir "$out/p2_figures" --images "$out/p2"
  echo "Look at faces.png, eta.png, slerp.png and lerp.png in $out/p2_figures; the faces are in $out/p2."
}

run_clip() {
  echo "Problem 3, 2024: the small CLIP classifies 2,500 pictures of 50 classes of coloured shapes that it never saw."
  local data="$out/clip_data"
  [ -d "$data" ] || "$PYTHON" -m scripts.make_clip_testset --output-dir "$data"
  bash "$ROOT/scripts/inference_clip.sh" "$data/val" "$data/id2label.json" "$out/clip" --model "$ROOT/checkpoints/clip_shapes"
  "$PYTHON" -m p3_clip.evaluate zero-shot --run "$out/clip"
  "$PYTHON" -m p3_clip.study.figures --run "$out/clip" --images "$data/val" --output-dir "$out/clip_figures"
  echo "Look at $out/clip_figures/examples.png: five successes and five failures; every prediction is in $out/clip/predictions.csv."
}

run_controlnet() {
  echo "Problem 3, 2025: 25 control pictures like the course's and 20 with two circles, drawn, graded by the bar of the latter, and shown."
  local data="$out/controlnet_data"
  "$PYTHON" -m scripts.make_circles --output-dir "$data"
  bash "$ROOT/hw2_3.sh" "$data/prompt.json" "$data/source" "$out/controlnet" "$ROOT/checkpoints/ldm_shapes"
  bash "$ROOT/scripts/grade.sh" "$out/controlnet" "$data/prompt.json" "$data/source" "$data/target" --resolution 64 --clip none \
    --iou-bar 0.9 || [ $? -eq 1 ]
  "$PYTHON" -m p3_controlnet.study.figures --output-dir "$out/controlnet_figures" --data "$data" --images "$out/controlnet" \
    --rows 45 --only circles failures
  echo "Look at $out/controlnet_figures/circles.png and $out/controlnet_figures/failures.png; the pictures are in $out/controlnet."
}

run_personalisation() {
  echo "Problem 3, 2024: four learned concepts without a name, each by itself and two in one picture, beside untrained words."
  local pictures="$out/personalisation" figures="$out/personalisation_figures"
  "$PYTHON" -m p3_clip.personalisation.study.sweeps --base "$ROOT/checkpoints/ldm_shapes" \
    --joint-cut-mix "$ROOT/checkpoints/concepts_shapes" --images 20 --clip none --output-dir "$pictures" \
    --result "$pictures/results.json"
  "$PYTHON" -m p3_clip.personalisation.study.figures --pictures "$pictures" --results "$pictures/results.json" --output-dir "$figures"
  echo "Look at $figures/single.png (photos and learned concepts) and $figures/beside.png (two in one picture); the pictures are in $pictures."
}

# What is asked for must be known and there, before anything is installed.
job="${1:-p1}"
if [ "$job" = all ]; then
  asked=("${jobs[@]}")
else
  asked=()
  for known in "${jobs[@]}"; do
    if [ "$job" = "$known" ]; then asked=("$job"); fi
  done
  if [ ${#asked[@]} -eq 0 ]; then
    echo "error: unknown job $job; usage: bash scripts/quickstart.sh [$(IFS="|"; echo "${jobs[*]}")|all] [OUT]" >&2
    exit 2
  fi
  missing="$(missing_of "$job")"
  if [ -n "$missing" ]; then
    echo "error: checkpoints/$missing is missing; it is part of the repository: restore it with git" >&2
    exit 2
  fi
fi
source "$here/scripts/environment.sh"
out="${2:-$ROOT/outputs}"

for job in "${asked[@]}"; do
  missing="$(missing_of "$job")"
  if [ -z "$missing" ]; then
    "run_$job"
  else
    echo "$job is left out: checkpoints/$missing is missing; it is part of the repository: restore it with git."
  fi
done
