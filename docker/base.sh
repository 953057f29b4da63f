#!/usr/bin/env bash
# Where no registry can be reached: make a stand-in for the base image from Debian's packages, under the very name that
# the Dockerfile uses. Needs root, buildah and debootstrap; kept as a tarball between runs.
#
#     docker/base.sh [IMAGE]
set -euo pipefail
image=${1:-python:3.11-slim-bookworm}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/twogate
tarball=$cache/base-bookworm-$(dpkg --print-architecture)-1.tar

if buildah inspect --type image "$image" >/dev/null 2>&1; then
  exit 0
fi
if [[ ! -f $tarball ]]; then
  mkdir -p "$cache"
  work=$(mktemp -d "$cache/debootstrap.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/root" >"$work/log" 2>&1 ||
    { tail -5 "$work/log" >&2; exit 1; }
  # As Debian's slim images do.
  rm -rf "$work"/root/usr/share/{doc,man,info,locale,groff,lintian}/* "$work"/root/var/{cache/apt,lib/apt/lists,log}/* \
    "$work"/root/debootstrap "$work"/root/dev/*
  tar -C "$work/root" --numeric-owner --sort=name -cf "$work/base.tar" .
  mv "$work/base.tar" "$tarball"
fi
container=$(buildah from scratch)
buildah add --quiet "$container" "$tarball" / >/dev/null
buildah config --cmd python3 "$container"
buildah commit --quiet --rm "$container" "$image" >/dev/null
