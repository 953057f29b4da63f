#!/usr/bin/env bash
# Build the CPU image with docker, podman or buildah, whichever is there and works.
#
#     docker/build.sh            or: make image
#     IMAGE=registry/twogate:1 PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:... BUILDER=podman docker/build.sh
#
# Where the base image cannot be pulled and buildah runs as root, docker/base.sh makes a stand-in from Debian's packages.
set -euo pipefail
cd "$(dirname "$0")/.."
image=${IMAGE:-twogate}
base=${PYTHON_IMAGE:-python:3.11-slim-bookworm}
started=$SECONDS

works() {
  case $1 in
    docker) docker info >/dev/null 2>&1 ;;
    podman) podman info >/dev/null 2>&1 ;;
    buildah) buildah --version >/dev/null 2>&1 ;;
  esac
}
builder=${BUILDER:-}
if [[ -z $builder ]]; then
  for candidate in docker podman buildah; do
    if works "$candidate"; then builder=$candidate && break; fi
  done
fi
[[ -n $builder ]] || { echo "make image: docker, podman or buildah is needed, and none is here and works" >&2; exit 1; }

# This machine's pip may know an index or a certificate that a build container does not. It can fetch for the image only
# if it is the same Python; where it cannot, the build fetches by itself. Either way, every file is checked by its hash.
if python3 -c 'import sys, platform; sys.exit(sys.version_info[:2] != (3, 11) or platform.libc_ver()[0] != "glibc")'; then
  rm -f docker/wheels/*.whl
  if ! python3 -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: --require-hashes \
    -r requirements/image.txt -d docker/wheels 2>/dev/null; then
    rm -f docker/wheels/*.whl
    echo "make image: wheels were not staged, the build fetches them itself" >&2
  fi
fi

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
arguments=(--file docker/Dockerfile --tag "$image" --build-arg "PYTHON_IMAGE=$base" --build-arg "VERSION=$version"
  --build-arg "REVISION=$revision")
if [[ $builder == docker ]]; then
  docker build "${arguments[@]}" .
else
  # Docker's format, because the other one has no HEALTHCHECK; the commit's time, so that a build can be repeated.
  arguments+=(--format docker --timestamp "$(git log -1 --format=%ct 2>/dev/null || echo 0)")
  if [[ $builder == buildah && $(id -u) == 0 ]]; then
    export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}
    buildah pull --quiet --policy missing "$base" >/dev/null 2>&1 || docker/base.sh "$base"
  fi
  "$builder" build "${arguments[@]}" .
fi
echo "make image: $image built with $builder in $((SECONDS - started)) s"
