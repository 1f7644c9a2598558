# Sourced by the entries: sets ROOT (the checkout) and PYTHON (its environment if there is one, else the machine's).
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ -z "${PYTHON:-}" ]; then
  PYTHON="$ROOT/.venv/bin/python"
  if [ ! -x "$PYTHON" ]; then
    PYTHON=python3
    if ! python3 -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
      echo "error: python3 lacks the packages; run python3 -m pip install -r requirements.txt, or quickstart.sh, which makes .venv" >&2
      exit 2
    fi
  fi
fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
