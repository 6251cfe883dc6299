#!/usr/bin/env bash
# Compile kernels into a folder that all users can read: install-kernels.sh FOLDER "ARCHS" ["MODES"]
# ARCHS: sm_90, x86-64-v3 and so on, or "host" for this machine's CPU.
# MODES: each also with the update RMS; without MODES, all there are.
set -euo pipefail
folder=$1
read -ra archs <<<"$2"
read -ra modes <<<"${3:-}"

options=()
for arch in "${archs[@]}"; do
  if [[ $arch == host ]]; then options+=(--host); else options+=(--arch "$arch"); fi
done
if ((${#modes[@]})); then options+=(--mode "${modes[@]}" "${modes[@]/%/-rms}"); fi
megatron-adams precompile --cache-dir "$folder" "${options[@]}"
