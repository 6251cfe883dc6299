#!/usr/bin/env bash
# Install the Slurm that tests/slurm starts, from Debian's or Ubuntu's packages. For machines that are
# there for tests: the packages bring system services, which this script keeps from starting.
set -euo pipefail
packages=(munge slurm-client slurmctld slurmd)

if [[ $(id -u) != 0 ]]; then
  echo "$0: must run as root, to install ${packages[*]}" >&2
  exit 1
fi
if ! command -v apt-get >/dev/null; then
  echo "$0: no apt-get; install Slurm (slurmctld, slurmd, its commands) and munge by hand" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# invoke-rc.d asks this program, and starts nothing where it answers 101.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  trap 'rm "$policy"' EXIT
fi
install=(apt-get install --yes --quiet --no-install-recommends "${packages[@]}")
"${install[@]}" || { apt-get update --quiet && "${install[@]}"; }
