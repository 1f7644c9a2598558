# Sourced by the other scripts: sets ROOT to the folder of the repository, and PYTHON, if it is not
# set, to the Python of .venv or else to python3.
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
