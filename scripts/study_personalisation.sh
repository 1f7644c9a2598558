#!/usr/bin/env bash
# The study of personalisation on the small model: learns the drawn concepts by textual inversion and by Custom Diffusion (jointly, and
# apart and merged), then measures and draws. Finished trainings and pictures are kept. Flags go to every training, for example --steps.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
runs="${RUNS_DIR:-$ROOT/runs}/personalisation"
base="${BASE:-$ROOT/checkpoints/ldm_shapes}"
train() { # METHOD NAME FLAGS...
  local method="$1" name="$2"
  shift 2
  "$PYTHON" -m p3_clip.personalisation.train "$method" --run-dir "$runs/$name" --base "$base" "$@"
}
train textual-inversion inversion "$@"
for pair in "place wine mauve" "beside slate_star ring"; do
  read -r name first second <<< "$pair"
  train custom-diffusion "$name" --drawn "$first" "$second" "$@"
  train custom-diffusion "$first" --drawn "$first" --tokens "<new1>" "$@"
  train custom-diffusion "$second" --drawn "$second" --tokens "<new2>" "$@"
  "$PYTHON" -m p3_clip.personalisation.merge --base "$base" --results "$runs/$first/last" "$runs/$second/last" \
    --output-dir "$runs/${name}_merged"
done
"$PYTHON" -m p3_clip.personalisation.study --base "$base" --inversion "$runs/inversion/last" --place "$runs/place/last" \
  --beside "$runs/beside/last" --place-merged "$runs/place_merged" --beside-merged "$runs/beside_merged" \
  --output-dir "$runs/pictures"
"$PYTHON" -m p3_clip.personalisation.figures --pictures "$runs/pictures"
"$PYTHON" "$ROOT/scripts/make_report.py"
