#!/usr/bin/env bash
# Install requirements, and keep what is installed as it is:
#   install-requirements.sh REQUIREMENTS CONSTRAINTS [REQUIREMENT...]
# REPLACE: names of installed packages that may be exchanged for those of CONSTRAINTS.
set -euo pipefail
requirements=$1 constraints=$2
here=$(dirname "$0")
read -ra replace <<<"${REPLACE:-}"

merged=$(mktemp)
trap 'rm -f "$merged"' EXIT
python "$here/constraints.py" "$constraints" --replace "${replace[@]}" >"$merged"
# The container's own constraints are in the merged file. Not --quiet: pip would not say which
# requirements conflict.
PIP_CONSTRAINT='' python -m pip install --progress-bar off --disable-pip-version-check \
  --no-cache-dir --root-user-action ignore --constraint "$merged" --requirement "$requirements" "${@:3}"
python "$here/constraints.py" --verify "$merged"
