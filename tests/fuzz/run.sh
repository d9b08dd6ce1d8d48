#!/usr/bin/env bash
# Runs every fuzz target under ASan and UBSan from seeds made by the programs themselves.
#   tests/fuzz/run.sh [SECONDS [TARGET...]]      default 20 s; all targets, as many at once as there are cores
# A finding stops the run and leaves the input in build/fuzz/findings.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=${1:-20}
cores=$(nproc) # before OMP_NUM_THREADS is set: nproc heeds it
shift || true
command -v clang >/dev/null || { echo "skipped: no clang"; exit 77; }
mkdir -p build/fuzz/findings
cmake --preset fuzz >build/fuzz.configure.log 2>&1 || { cat build/fuzz.configure.log; exit 1; }
cmake --build --preset fuzz -j "$cores" >build/fuzz.build.log 2>&1 || { tail -n 40 build/fuzz.build.log; exit 1; }
base=$PWD/build/fuzz/base
rm -rf "$base"
mkdir -p "$base"
# HDF5 drops memory when it refuses a damaged file; leaks of ours are still found.
printf 'leak:libhdf5\n' >build/fuzz/suppressions
export LSA_FUZZ_BASE=$base LSAN_OPTIONS=suppressions=$PWD/build/fuzz/suppressions:print_suppressions=0
export ASAN_OPTIONS=detect_leaks=1:allocator_may_return_null=1 OMP_NUM_THREADS=1
bin=build/fuzz/bin
$bin/lsa-dump synth --out "$base/shards" --docs 2 --tokens 256 --layers 2 --hidden 16 --seed 3 >/dev/null 2>&1
$bin/lsa-train run --recipe recipes/smoke.yaml --data "$base/shards" --out "$base/run" --device cpu --set train.steps=1 --set train.batch=2 \
    --set model.heads=1 --set model.rank=2 --set sample.val_documents=0 --set window.tail=64 >/dev/null 2>&1
cp -r "$base"/run/ckpt/step_* "$base/ckpt"
$bin/lsa-export write "$base/run" --out "$base/indexer" --pt-freqs 1 >/dev/null 2>&1
python=build/venv/bin/python
[ -x "$python" ] || python=python3
PYTHONPATH=tests/testkit "$python" - "$base/pkl" <<'PY'
import os, sys
import numpy as np
from safetensors.numpy import save_file
import flashmemory_pickle as fm
os.makedirs(sys.argv[1])
d = {k: v for k, v in fm.document(0, tokens=2, prompt=6).items() if not k.startswith(("logits", "weights"))}
open(sys.argv[1] + "/doc_00000.pkl", "wb").write(fm.dumps(d))
keys = {f"index_keys.{o}": d[f"compk_layer_{o}"] for o in fm.LAYERS}
save_file({"indexer_topk": np.zeros((2, 3, 1), np.int32), "hidden_states": np.ones((2, 2, fm.HIDDEN), np.float16), "token_ids": np.arange(8), **keys},
          sys.argv[1] + "/line.safetensors")
PY
corpus() { # target: prints its seed folder
    local d=build/fuzz/corpus/$1
    mkdir -p "$d"
    case $1 in
    fuzz_recipe) cp recipes/*.yaml "$d" ;;
    fuzz_safetensors) cp "$base/ckpt/model.safetensors" "$d" ;;
    fuzz_torch)
        cp "$base/indexer/indexer.pt" "$d"
        python3 -c 'import sys, zipfile; open(sys.argv[2], "wb").write(zipfile.ZipFile(sys.argv[1]).read("indexer/data.pkl"))' \
            "$base/indexer/indexer.pt" "$d/pickle" ;;
    fuzz_import)
        { printf '\x00'; cat "$base/pkl/doc_00000.pkl"; } >"$d/pickle"
        { printf '\x01'; cat "$base/pkl/line.safetensors"; } >"$d/line" ;;
    fuzz_manifest) cp "$base/shards/manifest.json" "$d" ;;
    fuzz_ckpt)
        { printf '\x02'; cat "$base/ckpt/state.json"; } >"$d/state"
        { printf '\x03'; cat "$base/ckpt/MANIFEST.json"; } >"$d/manifest"
        { printf '\x00'; head -c 4096 "$base/ckpt/model.safetensors"; } >"$d/model"
        printf '\x81\x00\x00\x00\x00\x08abcdefgh' >"$d/patch" ;;
    fuzz_indexer)
        { printf '\x00'; cat "$base/indexer/indexer.safetensors"; } >"$d/file"
        printf '\x01\x10\x00\x00\x00\x03abcd' >"$d/patch" ;;
    *) printf '\x00\x10\x00\x00\x03abcd' >"$d/patch" ;;
    esac
    echo "$d"
}
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(cd build/fuzz/fuzz && ls)
one() {
    local t=$1 log=build/fuzz/$1.log
    "build/fuzz/fuzz/$t" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=3000 -max_len=8192 -print_final_stats=1 \
        -artifact_prefix="build/fuzz/findings/$t-" "$(corpus "$t")" >"$log" 2>&1 || { tail -n 40 "$log"; echo "$t: FOUND SOMETHING"; return 1; }
    echo "$t: clean, $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs in $seconds s"
}
export -f one corpus
export seconds base
printf '%s\n' "${targets[@]}" | xargs -P "$cores" -I{} bash -c 'set -euo pipefail; one {}'
rm -rf /dev/shm/lsa-fuzz-* /tmp/lsa-fuzz-*
