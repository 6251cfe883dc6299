#!/usr/bin/env bash
# Install the package's wheel: install-plugin.sh DIST
# --no-deps: what it needs is there, and nothing else may be exchanged.
set -euo pipefail
dist=$1

python -m pip install --quiet --disable-pip-version-check --no-cache-dir --root-user-action ignore \
  --no-deps --no-index "$dist"/megatron_adams-*.whl
megatron-adams --help >/dev/null
