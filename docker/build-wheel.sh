#!/usr/bin/env bash
# Build the package's wheel, and write down what it needs: build-wheel.sh OUT "EXTRAS" [PIP OPTIONS]
# The wheel's bytes follow from the sources and constraints.txt alone, so that a commit that changes
# neither leaves the image's layers as they are.
set -euo pipefail
umask 022 # the wheel holds the modes of its files
mkdir -p "$1"
out=$(cd "$1" && pwd)
read -ra extras <<<"$2"
root=$(cd "$(dirname "$0")/.." && pwd)

# A copy, because the build writes into the sources.
sources=$(mktemp -d)
trap 'rm -rf "$sources"' EXIT
cp -R "$root"/{pyproject.toml,setup.py,megatron-adams.pth,README.md,LICENSE,megatron_adams} "$sources"
export SOURCE_DATE_EPOCH=315532800 # 1980, the first year that a zip file can hold

# setuptools at the version of constraints.txt: older releases of pip take it from PIP_CONSTRAINT.
export PIP_CONSTRAINT=$root/constraints.txt PIP_BUILD_CONSTRAINT=$root/constraints.txt
python -m pip wheel --quiet --disable-pip-version-check --no-cache-dir --no-deps --wheel-dir "$out" \
  "${@:3}" "$sources"
python "$root/docker/requirements.py" "$root/pyproject.toml" "${extras[@]}" >"$out/requirements.txt"
