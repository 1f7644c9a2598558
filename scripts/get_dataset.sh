#!/usr/bin/env bash
# Downloads and unpacks the course's data: get_dataset.sh [2024|2025] [DEST]. Defaults: 2025 and
# hw2_data. Files and folders that exist in DEST are kept. A failed or interrupted download leaves
# no files.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"

fail() {
  echo "error: $1" >&2
  exit 2
}

edition="${1:-2025}"
dest="${2:-$ROOT/hw2_data}"
case "$edition" in
  2024) id=1W6Y1OmjzNw2qHoGDCpGOwGpw27wLg1fi ;;
  2025) id=116zRmpJeDiHhWLtGPSI5gS4cp9yvJ1uc ;;
  *) fail "unknown edition $edition; usage: bash scripts/get_dataset.sh [2024|2025] [DEST]" ;;
esac
[ $# -le 2 ] || fail "too many arguments; usage: bash scripts/get_dataset.sh [2024|2025] [DEST]"
mkdir -p -- "$dest" 2>/dev/null || fail "cannot make the folder $dest"

# The temporary folder is on the disk of DEST, so that the moves at the end are renames.
partial="$(mktemp -d -- "$dest/.download.XXXXXX" 2>/dev/null)" ||
  fail "cannot write to the folder $dest"
trap 'rm -rf -- "$partial"; rmdir -- "$dest" 2>/dev/null || true' EXIT
echo "Downloading the archive of $edition into $dest."
"$PYTHON" -m gdown "$id" -O "$partial/archive.zip" ||
  fail "the download failed; place the course's archive by hand (unpacked into $dest, see \
hw2_data/README.md), or make a small set of digits without internet access: \
.venv/bin/python -m scripts.make_sample_data"
echo "Unpacking."
mkdir -- "$partial/content"
"$PYTHON" -m zipfile -e "$partial/archive.zip" "$partial/content" 2>/dev/null ||
  fail "the download is no whole zip archive, or the disk is full; try again, or place the \
course's archive by hand"

# The archive holds either one folder hw2_data or that folder's content.
content="$partial/content"
if [ -d "$content/hw2_data" ]; then content="$content/hw2_data"; fi
[ -n "$(ls -A -- "$content")" ] || fail "the archive is empty; place the course's archive by hand"
for entry in "$content"/*; do
  name="$(basename -- "$entry")"
  if [ "$name" = __MACOSX ]; then continue; fi
  if [ -e "$dest/$name" ]; then
    echo "kept $dest/$name, which existed before; remove it and run again to get the archive's"
  else
    mv -- "$entry" "$dest/$name"
    echo "got  $dest/$name"
  fi
done
