#!/usr/bin/env bash
# Create the user that the image runs as: create-user.sh NAME UID [USERADD OPTIONS]
# It has a home folder, for caches, and no password.
set -euo pipefail
name=$1 uid=$2

groupadd "${@:3}" --gid "$uid" "$name"
useradd "${@:3}" --uid "$uid" --gid "$uid" --create-home --shell /bin/bash "$name"
