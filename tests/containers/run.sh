#!/bin/sh
# make test-containers: builds the image from deploy/Dockerfile with podman on a Debian base made here, and runs the
# Jobs of the cpu-demo overlay as pods. Needs root, and Debian's and Python's package registries; no image registry.
set -eu
cd "$(dirname "$0")/../.."
here=tests/containers
build=build/containers
base=localhost/debian-python:bookworm
image=localhost/dcgan:0.1.0
export CONTAINERS_CONF="$PWD/$here/containers.conf"
mkdir -p "$build"

if ! command -v podman >/dev/null || ! command -v debootstrap >/dev/null; then
    echo "error: podman or debootstrap is missing; run: sudo make system-slow" >&2
    exit 69
fi

if ! podman image exists "$base"; then
    echo "== the base image, by debootstrap"
    root=$(mktemp -d)
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" >"$build/debootstrap.log"
    tar -C "$root" --exclude='./proc/*' --exclude='./var/cache/apt/archives/*.deb' -c . | podman import --quiet - "$base"
    rm -rf "$root"
fi

# Fetched outside the build, which then needs no network and is the same however pip is configured here.
wanted=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
if [ ! -e "$build/wheels/.$wanted" ]; then
    echo "== the wheels"
    mkdir -p "$build/wheels"
    .venv/bin/python -m pip download --quiet --progress-bar off -d "$build/wheels" -c constraints.txt \
        '.[cpu,data,eval]' setuptools wheel
    touch "$build/wheels/.$wanted"
fi

echo "== the image, from deploy/Dockerfile"
podman build --quiet --pull=never --network none --volume "$PWD/$build/wheels:/wheels:ro" \
    --build-arg BASE_IMAGE="$base" --build-arg TORCH_INDEX=file:///wheels \
    --build-arg PIP_OPTIONS="--no-index --find-links /wheels" -f deploy/Dockerfile -t "$image" .
podman image inspect --format 'image of {{.Size}} bytes' "$image"

exec .venv/bin/python -m pytest -m slow -s "$here" "$@"
