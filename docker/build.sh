#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'END'
Build an image of megatron-adams: docker/build.sh gpu|cpu [OPTIONS] [-- BUILD OPTIONS]

  --tag NAME    by default megatron-adams:<version>-gpu or -cpu
  --tool NAME   docker, podman or buildah; by default the first that is installed
  --print       print the command and exit

  docker/build.sh cpu --tool podman
  docker/build.sh gpu -- --build-arg KERNEL_ARCHS=sm_90

The labels hold the commit's hash and date. SOURCE_DATE_EPOCH in the environment replaces the date.
END
}

fail() {
  echo "build.sh: $1" >&2
  exit 2
}

kind='' tag='' tool='' print=''
while (($#)); do
  case $1 in
    gpu | cpu) kind=$1 ;;
    --tag | --tool)
      (($# > 1)) || fail "$1: needs a value"
      if [[ $1 == --tag ]]; then tag=$2; else tool=$2; fi
      shift
      ;;
    --print) print=1 ;;
    --help | -h) usage && exit 0 ;;
    --) shift && break ;;
    *) fail "$1: must be gpu, cpu or an option; see docker/build.sh --help" ;;
  esac
  shift
done
[[ $kind ]] || fail "which image: give gpu or cpu; see docker/build.sh --help"

cd "$(dirname "$0")/.."
if [[ ! $tool ]]; then
  for name in docker podman buildah; do
    if command -v "$name" >/dev/null; then tool=$name && break; fi
  done
  [[ $tool ]] || fail "none of docker, podman and buildah is on PATH: install one"
fi
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' megatron_adams/__init__.py)
revision=$(git rev-parse HEAD)
[[ -z $(git status --porcelain) ]] || revision+=-dirty
epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
created=$(date --utc --date "@$epoch" +%Y-%m-%dT%H:%M:%SZ)

case $tool in
  # HEALTHCHECK is Docker's; images in the OCI format have none.
  podman | buildah) command=("$tool" build --format docker --timestamp "$epoch") ;;
  docker) command=(docker build --build-arg "SOURCE_DATE_EPOCH=$epoch") ;;
  *) fail "--tool $tool: must be docker, podman or buildah" ;;
esac
command+=(
  --file "docker/$kind.Dockerfile"
  --tag "${tag:-megatron-adams:$version-$kind}"
  --build-arg "VERSION=$version"
  --build-arg "REVISION=$revision"
  --build-arg "CREATED=$created"
  "$@"
  .
)
if [[ $print ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
