#!/usr/bin/env bash
# Installs, builds and runs all that this machine can run. The last lines say what passed, failed and was skipped.
#   tests/run.sh          everything (about 22 minutes on 2 cores)
#   tests/run.sh quick    one build, the fast labels only
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:-all}
jobs=$(nproc)
bash recipes/install-deps.sh --tests

say() { printf '\n== %s\n' "$*"; }
configure_build() { # preset [cmake flags]
    cmake --preset "$@" >"build/$1.configure.log" 2>&1 || { cat "build/$1.configure.log"; exit 1; }
    cmake --build --preset "$1" -j "$jobs" >"build/$1.build.log" 2>&1 || { tail -n 60 "build/$1.build.log"; exit 1; }
}
mkdir -p build

say "gcc, CPU: build with warnings as errors"
configure_build cpu
if [ "$mode" = quick ]; then
    exec ctest --test-dir build/cpu -L 'lint|unit|ops|oracle' --output-on-failure -j "$jobs"
fi

say "clang: build with warnings as errors"
configure_build cpu-clang

if command -v nvcc >/dev/null; then
    say "CUDA: every source for sm_80, sm_90a, sm_100, warnings as errors"
    configure_build cuda
    build/cuda/bin/lsa-train --version
else
    echo "nvcc not found: CUDA sources are not compiled on this machine"
fi

say "sanitizers: unit, ops, oracle and golden under ASan and UBSan"
configure_build asan
ctest --test-dir build/asan -L 'unit|ops|oracle|golden' --output-on-failure -j "$jobs"

say "fuzz smoke: 20 s a target"
bash tests/fuzz/run.sh 20

say "all tests"
ctest --test-dir build/cpu --output-on-failure -j "$jobs"
