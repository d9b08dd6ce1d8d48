#!/usr/bin/env bash
# Installs what lsa builds and tests with on Debian/Ubuntu. Idempotent: a machine that has everything is left alone.
#   recipes/install-deps.sh          what building and running needs
#   recipes/install-deps.sh --tests  also what the tests need (cmocka, clang, valgrind, chromium, a Python venv)
set -euo pipefail
cd "$(dirname "$0")/.."

pkgs=(build-essential cmake ninja-build pkg-config libhdf5-dev libjansson-dev libcyaml-dev libyaml-dev
      libxxhash-dev zlib1g-dev libopenblas-openmp-dev libopenmpi-dev openmpi-bin)
if [ "${1:-}" = "--tests" ]; then
    pkgs+=(libcmocka-dev clang clang-format-14 libclang-rt-14-dev libomp-14-dev valgrind chromium iproute2)
fi

missing=()
for p in "${pkgs[@]}"; do
    dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ]; then sudo=(); else sudo=(sudo); fi
    echo "installing: ${missing[*]}"
    "${sudo[@]}" apt-get update -qq
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

if [ "${1:-}" = "--tests" ]; then
    mkdir -p build
    [ -x build/venv/bin/python ] || python3 -m venv build/venv
    build/venv/bin/python -c 'import gguf, h5py, numpy, safetensors, tensorboard' 2>/dev/null ||
        build/venv/bin/pip -q install 'numpy<3' h5py safetensors tensorboard gguf 'setuptools<81'
fi
