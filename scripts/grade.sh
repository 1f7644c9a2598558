#!/usr/bin/env bash
# Grades an output folder as the course does, with the evaluate program of its problem. The last
# line is PASS or FAIL and the reason. The exit code is 0 for a pass, 1 for a grade below the bar,
# and 2 if the folder cannot be graded. With --html PAGE what was graded is also written as a page,
# the worst pictures first. Flags are those of the evaluate program:
#   grade.sh OUT [flags]                              digits, p1_diffusion.evaluate
#   grade.sh OUT REFERENCES [flags]                   faces, p2_ddim.evaluate
#   grade.sh OUT prompt.json SOURCES TARGETS [flags]  circles, p3_controlnet.evaluate
#   grade.sh OUT input.json PHOTOS [flags]            learned concepts, p3_clip.evaluate
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
if [ $# -lt 1 ]; then
  echo "usage: bash scripts/grade.sh OUT [flags] for digits, OUT REFERENCES [flags] for faces," \
    "OUT prompt.json SOURCES TARGETS [flags] for circles, OUT input.json PHOTOS [flags] for" \
    "learned concepts (flags of the evaluate program)" >&2
  exit 2
fi
out="$1"
shift
fail() { # SENTENCE
  echo "error: $1" >&2 || true
  echo "FAIL: nothing is graded: $1" || true
  exit 2
}
grade() { # PROGRAM ARGUMENTS...
  local code=0
  "$PYTHON" -m "$@" || code=$?
  if [ "$code" -gt 2 ]; then # a program that ends by itself says PASS or FAIL
    echo "FAIL: nothing is graded: the program ended with exit code $code" || true
  fi
  exit "$code"
}
if [ -d "$out/mnistm" ] || [ -d "$out/svhn" ]; then
  grade p1_diffusion.evaluate --images "$out" "$@"
fi
if [ $# -gt 0 ] && [[ "$1" == *.json ]] && [ ! -f "$1" ]; then
  fail "the file $1 does not exist"
fi
if [ -d "${1:-}" ]; then
  grade p2_ddim.evaluate --images "$out" --references "$@"
fi
if [ -f "${1:-}" ] && [ $# -ge 2 ] && [[ "${3:---}" == --* ]]; then
  input="$1" photos="$2"
  shift 2
  grade p3_clip.evaluate personalised --images "$out" --input "$input" \
    --references "$photos" "$@"
fi
if [ -f "${1:-}" ] && [ $# -ge 3 ]; then
  prompts="$1" sources="$2" targets="$3"
  shift 3
  grade p3_controlnet.evaluate --images "$out" --prompts "$prompts" \
    --sources "$sources" --targets "$targets" "$@"
fi
for path in "$out" "$@"; do
  if [[ "$path" == --* ]]; then break; fi
  if [ ! -e "$path" ]; then fail "$path does not exist"; fi
done
fail "$out is not an output folder of this homework: Problem 1's has mnistm/ and svhn/, \
Problem 2's needs a folder of references after it, Problem 3's prompt.json and the folders of \
sources and targets, or input.json and the folder of photos"
