#!/usr/bin/env bash
# The server library under valgrind: no invalid read, no value that was never set, nothing lost. It is built again
# without -march=native, because valgrind does not know AVX-512.
set -uo pipefail
cd "$(dirname "$0")/../.."
command -v valgrind >/dev/null || { echo "skipped: no valgrind"; exit 77; }
. tests/testkit/expect.sh
quiet() { "$@" >"$work/out" 2>&1 || { bad "exit $?: $*"; cat "$work/out"; }; }
build=${LSA_BUILD:?}/valgrind
quiet cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLSA_NATIVE=OFF -DLSA_CUDA=OFF -DLSA_TESTS=OFF
quiet cmake --build "$build" --target lsa_indexer
quiet cc -std=c17 -D_GNU_SOURCE -g -I. tests/e2e/abi_exercise.c -L"$build/lib" -llsa_indexer -lm -Wl,-rpath,"$build/lib" -o "$work/exercise"
quiet "$bin/lsa-export" import recipes/mini/teacher --out "$work/native"
quiet "$bin/lsa-export" write "$work/native" --out "$work/indexer"
mkdir "$work/short"
head -c 20000 "$work/indexer/indexer.safetensors" >"$work/short/indexer.safetensors"
export OMP_NUM_THREADS=1
check() { valgrind -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite,indirect,possible "$@"; }
expect 0 "exercised" check "$work/exercise" "$work/indexer" "$work/short"

# must fail: a program that loses memory and reads what was never set
printf '#include <stdlib.h>\nint main(void) { volatile int *p = malloc(8); int v = p[1]; p = 0; return v == 7; }\n' >"$work/bad.c"
quiet cc -g -O0 "$work/bad.c" -o "$work/bad"
check "$work/bad" >/dev/null 2>&1 && bad "valgrind does not see a lost block"
verdict
