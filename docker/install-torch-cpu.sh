#!/usr/bin/env bash
# Install torch's CPU build at the version of constraints.txt: install-torch-cpu.sh CONSTRAINTS INDEX
# --no-deps: that index has few other packages. What torch needs is installed with the rest.
set -euo pipefail
constraints=$1 index=$2

requirement=$(grep -m1 '^torch==' "$constraints")
python -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps \
  --index-url "$index" "$requirement"
