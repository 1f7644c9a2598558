#!/usr/bin/env bash
# Makes the environment, runs a problem with the shipped weights, and makes its figures:
# quickstart.sh [JOB|all] [OUT]. Defaults: p1 and outputs/.
# The job demo opens the web demo instead and is no part of all.
# A job has a name in `jobs`, its weights in `weights_of`, and a function `run_NAME`.
set -euo pipefail
PYTHON="made below" source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
jobs=(p1 p2 clip controlnet personalisation)

weights_of() {  # the folders in checkpoints/ that the job needs
  case "$1" in
    p1) echo p1_digits ;;
    p2) echo p2_faces ;;
    clip) echo clip_shapes ;;
    controlnet) echo ldm_shapes ;;
    personalisation) echo ldm_shapes concepts_shapes ;;
  esac
}

missing_of() {  # the first of these folders that is missing; empty if none is
  local folder
  for folder in $(weights_of "$1"); do
    if [ ! -d "$ROOT/checkpoints/$folder" ]; then echo "$folder"; return; fi
  done
}

run_p1() {
  echo "Problem 1: samples 500 digits in the grader's layout, grades them with the project's" \
    "classifier, and makes the report's figures."
  bash "$ROOT/hw2_1.sh" "$out/p1"
  # Exit code 1 is a grade below the baseline; 2 is an error.
  bash "$ROOT/scripts/grade.sh" "$out/p1" || [ $? -eq 1 ]
  "$PYTHON" -m p1_diffusion.study.figures --images "$out/p1" --output-dir "$out/p1_figures"
  echo "Look at $out/p1_figures/grid_mixed.png and $out/p1_figures/reverse_2025.png;" \
    "the digits are in $out/p1."
}

run_p2() {
  echo "Problem 2: samples ten faces from fixed noises by DDIM, four of them with several" \
    "values of eta, and interpolations between two noises."
  "$PYTHON" -m scripts.make_noise --output-dir "$out/p2_noise"
  bash "$ROOT/hw2_2.sh" "$out/p2_noise" "$out/p2"
  "$PYTHON" -m p2_ddim.study.figures --noises "$out/p2_noise" --output-dir "$out/p2_figures" \
    --images "$out/p2"
  echo "Look at faces.png, eta.png, slerp.png and lerp.png in $out/p2_figures;" \
    "the faces are in $out/p2."
}

run_clip() {
  echo "Problem 3, 2024: zero-shot classification of 2,500 images of coloured shapes by the small" \
    "CLIP; its training excluded their 50 classes."
  local data="$out/clip_data"
  [ -d "$data" ] || "$PYTHON" -m scripts.make_clip_testset --output-dir "$data"
  bash "$ROOT/scripts/inference_clip.sh" "$data/val" "$data/id2label.json" "$out/clip" \
    --model "$ROOT/checkpoints/clip_shapes"
  "$PYTHON" -m p3_clip.evaluate zero-shot --run "$out/clip"
  "$PYTHON" -m p3_clip.study.figures --run "$out/clip" --images "$data/val" \
    --output-dir "$out/clip_figures"
  echo "Look at $out/clip_figures/examples.png: five successes and five failures;" \
    "all predictions are in $out/clip/predictions.csv."
}

run_controlnet() {
  echo "Problem 3, 2025: samples images from 25 control images like the course's and 20 with two" \
    "circles, and grades them (IoU of at least 0.9)."
  local data="$out/controlnet_data"
  "$PYTHON" -m scripts.make_circles --output-dir "$data"
  bash "$ROOT/hw2_3.sh" "$data/prompt.json" "$data/source" "$out/controlnet" \
    "$ROOT/checkpoints/ldm_shapes"
  bash "$ROOT/scripts/grade.sh" "$out/controlnet" "$data/prompt.json" "$data/source" \
    "$data/target" --resolution 128 --clip none || [ $? -eq 1 ]
  "$PYTHON" -m p3_controlnet.study.figures --output-dir "$out/controlnet_figures" --data "$data" \
    --images "$out/controlnet" --rows 45 --only circles failures
  echo "Look at $out/controlnet_figures/circles.png and $out/controlnet_figures/failures.png;" \
    "the images are in $out/controlnet."
}

run_personalisation() {
  echo "Problem 3, 2024: samples images of four learned concepts, alone and two in one image, and" \
    "of untrained tokens for comparison."
  local pictures="$out/personalisation" figures="$out/personalisation_figures"
  "$PYTHON" -m p3_clip.personalisation.study.sweeps --base "$ROOT/checkpoints/ldm_shapes" \
    --joint-collage "$ROOT/checkpoints/concepts_shapes" --images 5 --clip none \
    --output-dir "$pictures" --result "$pictures/results.json"
  "$PYTHON" -m p3_clip.personalisation.study.figures --pictures "$pictures" \
    --results "$pictures/results.json" --output-dir "$figures"
  echo "Look at $figures/single.png (photos and learned concepts) and $figures/beside.png (two in" \
    "one image); the images are in $pictures."
}

if [ "${1:-}" = demo ]; then
  shift
  exec bash "$ROOT/scripts/demo.sh" --open-browser "$@"
fi

# Check the job and its weights before anything is installed.
job="${1:-p1}"
if [ "$job" = all ]; then
  asked=("${jobs[@]}")
else
  asked=()
  for known in "${jobs[@]}"; do
    if [ "$job" = "$known" ]; then asked=("$job"); fi
  done
  if [ ${#asked[@]} -eq 0 ]; then
    echo "error: unknown job $job; usage: bash scripts/quickstart.sh" \
      "[$(IFS="|"; echo "${jobs[*]}")|all] [OUT], or demo" >&2
    exit 2
  fi
  missing="$(missing_of "$job")"
  if [ -n "$missing" ]; then
    echo "error: checkpoints/$missing is missing; it is part of the repository:" \
      "restore it with git" >&2
    exit 2
  fi
fi
source "$ROOT/scripts/environment.sh"
out="${2:-$ROOT/outputs}"

for job in "${asked[@]}"; do
  missing="$(missing_of "$job")"
  if [ -z "$missing" ]; then
    "run_$job"
  else
    echo "$job is left out: checkpoints/$missing is missing; it is part of the repository:" \
      "restore it with git."
  fi
done
