#!/usr/bin/env bash
# What can be checked of containers and deployment without a Docker engine: lint, build, run, render, validate.
# .ci/run calls it. Installs Debian's tools where it may; says what it cannot check and why, and goes on with the rest.
#
#     docker/check.sh PYTHON          an interpreter with requirements/dev.txt
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?which Python? one that has requirements/dev.txt}
cache=${XDG_CACHE_HOME:-$HOME/.cache}/twogate
started=$SECONDS
skip() { echo "container checks: skipped: $1"; }
passed() { echo "container checks: $1 ($((SECONDS - started)) s)"; }

# Linters, pinned as everything else.
key=$(sha256sum < requirements/container.txt | cut -c1-16)
tools=$cache/container-$key
mkdir -p "$cache"
if [[ ! -f $tools/complete ]]; then
  rm -rf "$tools"
  if { python3 -m venv "$tools" && "$tools/bin/python" -m pip --disable-pip-version-check install --quiet \
    --require-hashes -r requirements/container.txt; } 2>"$cache/pip.log"; then
    touch "$tools/complete"
  else
    tail -3 "$cache/pip.log"
    skip "the linters cannot be installed"
  fi
fi
if [[ -f $tools/complete ]]; then
  "$tools/bin/hadolint" docker/Dockerfile*
  passed "hadolint is clean"
  "$tools/bin/python" deploy/kubernetes/check.py
  passed "the Kubernetes manifests are valid"
fi

missing=()
for tool in buildah debootstrap nginx promtool; do command -v "$tool" >/dev/null || missing+=("$tool"); done
[[ -e /usr/lib/nginx/modules/ngx_http_js_module.so ]] || missing+=(njs)
if ((${#missing[@]})); then
  export DEBIAN_FRONTEND=noninteractive
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    skip "${missing[*]} not here, and to install them takes root and Debian"
  elif { apt-get update -qq && apt-get install -y -qq --no-install-recommends buildah debootstrap nginx-light \
    libnginx-mod-http-js prometheus; } >"$cache/apt.log" 2>&1; then
    passed "installed ${missing[*]}"
  else
    tail -3 "$cache/apt.log"
    skip "${missing[*]} cannot be installed"
  fi
fi
"$python" -m pytest -q -rs tests/deploy # names what it skips without nginx or promtool
passed "the recipes hold, as far as their tools are here"
if command -v promtool >/dev/null; then
  promtool check rules deploy/prometheus/alerts.yml
  promtool check config --syntax-only deploy/prometheus/prometheus.yml
  promtool test rules deploy/prometheus/alerts.test.yml
  passed "Prometheus takes the configuration and the alerts fire when they must"
else
  skip "no promtool for the alerts"
fi

# The image. Each step needs the one before, so the first that cannot be taken ends it.
no_image() { skip "the image: $1"; exit 0; }
[[ $(id -u) == 0 ]] || no_image "building without an engine needs root"
command -v buildah >/dev/null || no_image "no buildah"
unshare --mount true 2>/dev/null || no_image "this root may not mount"
# Images of its own, with the storage and the isolation that work even inside another container.
export BUILDAH_ISOLATION=chroot CONTAINERS_STORAGE_CONF=$cache/storage.conf
printf '[storage]\ndriver = "vfs"\ngraphroot = "%s"\nrunroot = "%s"\n' "$cache/images" "$cache/images-run" >"$CONTAINERS_STORAGE_CONF"
base=${PYTHON_IMAGE:-python:3.11-slim-bookworm}
buildah pull --quiet --policy missing "$base" >/dev/null 2>&1 || docker/base.sh "$base" ||
  no_image "the base image can neither be pulled nor made"
if ! BUILDER=buildah make --no-print-directory image >"$cache/image.log" 2>&1; then
  tail -30 "$cache/image.log"
  if grep -q "were not staged" "$cache/image.log"; then no_image "the packages cannot be fetched"; fi
  exit 1
fi
tail -1 "$cache/image.log"
"$python" docker/check.py twogate "$base"
buildah rmi --prune --force >/dev/null 2>&1 || true # what the last run left
passed "the service runs from the image"
