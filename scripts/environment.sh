# Sourced by quickstart.sh and test.sh: makes .venv and installs requirements.txt at the versions of
# constraints.txt, if this was not done since one of the two files changed (the stamp
# .venv/installed holds both). Sets PYTHON to the Python of .venv.
PYTHON="made below" source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
stamp="$ROOT/.venv/installed"
if ! cat "$ROOT/requirements.txt" "$ROOT/constraints.txt" | cmp -s - "$stamp"; then
  base="$(command -v python3 || true)"
  if [ -z "$base" ] || ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed (python3 on the PATH)" >&2
    exit 2
  fi
  echo "Making .venv and installing requirements.txt; the first time this downloads PyTorch and" \
    "takes minutes."
  "$base" -m venv "$ROOT/.venv"
  "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r "$ROOT/requirements.txt" -c "$ROOT/constraints.txt"
  "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --no-deps --editable "$ROOT"
  cat "$ROOT/requirements.txt" "$ROOT/constraints.txt" > "$stamp"
fi
PYTHON="$ROOT/.venv/bin/python"
export PYTHON

# install_extra NAME installs an extra of pyproject.toml into .venv at the versions of
# constraints.txt, if this was not done since one of the two files changed.
install_extra() {
  local installed="$ROOT/.venv/installed_$1"
  if ! cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cmp -s - "$installed"; then
    echo "Installing the extra $1 of pyproject.toml."
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$ROOT[$1]" \
      -c "$ROOT/constraints.txt"
    cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" > "$installed"
  fi
}
