# Sourced by the other scripts: sets ROOT to the folder of the repository, and PYTHON, if it is not
# set, to the Python of .venv or else to python3. If --help or -h is among the arguments of the
# script, it prints the comment at the script's head and the flags of the program in $HELP_OF, if
# there is one, and ends the script, which thus starts nothing.
help=""
for argument in "$@"; do
  case "$argument" in -h | --help) help=1 ;; esac
done
if [ -n "$help" ]; then
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  if [ -z "${HELP_OF:-}" ]; then exit 0; fi
  echo
fi
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
  PYTHON="$ROOT/.venv/bin/python"
  if [ ! -x "$PYTHON" ]; then
    PYTHON=python3
    if ! python3 -c \
      'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
      echo "error: python3 lacks the packages; run python3 -m pip install -r requirements.txt, or" \
        "scripts/quickstart.sh, which makes .venv" >&2
      exit 2
    fi
  fi
fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# shellcheck disable=SC2086  # a program and its subcommand
if [ -n "$help" ]; then exec "$PYTHON" -m $HELP_OF --help; fi
