#!/usr/bin/env bash
# Install Debian packages, and none that they only recommend: install-packages.sh PACKAGE...
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive

apt-get update --quiet
apt-get install --quiet --yes --no-install-recommends -- "$@"
# The lists of packages differ from day to day, and the image does not need them.
lists=$(apt-config shell lists Dir::State::lists/d)
eval "$lists"
rm -rf "${lists:?}"/*
