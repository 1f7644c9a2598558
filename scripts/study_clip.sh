#!/usr/bin/env bash
# Computes the numbers and figures of the report's zero-shot section: the compositional test with
# the shipped small CLIP, and the speed. Takes minutes on two CPU cores. If the course's images are
# in hw2_data/clip_zeroshot, OpenAI's ViT-B/32 is measured on them as well.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
test_set="$ROOT/hw2_data/clip_shapes_test"
[ -d "$test_set" ] || "$PYTHON" -m scripts.make_clip_testset --output-dir "$test_set"
count="$(find "$test_set" -path '*/val/*.png' | wc -l)"  # 0 without val/
if [ "$count" -ne 2500 ] || [ ! -f "$test_set/id2label.json" ]; then
  echo "error: $test_set holds $count pictures, but 2,500 and id2label.json are expected: delete" \
    "the folder and run this script again, which makes it" >&2
  exit 2
fi
study() { # NAME DATA FLAGS...
  local name="$1" data="$2"
  shift 2
  "$PYTHON" -m p3_clip.inference --images "$data/val" --labels "$data/id2label.json" \
    --output-dir "$work/$name" "$@"
}
study shapes "$test_set" --model "$ROOT/checkpoints/clip_shapes"
"$PYTHON" -m p3_clip.evaluate zero-shot --run "$work/shapes" \
  --result "$ROOT/results/p3_clip_shapes_evaluation.json"
"$PYTHON" -m p3_clip.study.colours --run "$work/shapes" \
  --result "$ROOT/results/p3_clip_shapes_evaluation.json"
"$PYTHON" -m p3_clip.study.figures --run "$work/shapes" --images "$test_set/val" \
  --output-dir "$ROOT/results/figures/p3_clip/shapes"
cp "$work/shapes/results.json" "$ROOT/results/p3_clip_shapes.json"
if [ -d "$ROOT/hw2_data/clip_zeroshot/val" ]; then
  course="$ROOT/hw2_data/clip_zeroshot"
  if study course "$course" --model ViT-B-32-quickgelu --pretrained openai; then
    "$PYTHON" -m p3_clip.evaluate zero-shot --run "$work/course" \
      --result "$ROOT/results/p3_clip_course_evaluation.json"
    "$PYTHON" -m p3_clip.study.figures --run "$work/course" --images "$course/val" \
      --output-dir "$ROOT/results/figures/p3_clip/course"
    cp "$work/course/results.json" "$ROOT/results/p3_clip_course.json"
  else
    echo "the course's images are left out because of the error above" >&2
  fi
fi
"$PYTHON" -m scripts.benchmark_clip --images "$test_set/val" \
  --model "$ROOT/checkpoints/clip_shapes" --result "$ROOT/results/p3_clip_speed.json"
"$PYTHON" -m scripts.make_report
