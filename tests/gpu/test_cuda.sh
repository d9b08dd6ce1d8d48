#!/usr/bin/env bash
# The CUDA column on a GPU: the same op tests and gradient oracle as the CPU column, loss curves against PyTorch's, bit-equal reruns, a kill
# and resume, and compute-sanitizer. Skipped (77) without a GPU; LSA_REQUIRE=gpu turns that into a failure.
set -euo pipefail
. "$(dirname "$0")/../testkit/gpu.sh"
build=${LSA_BUILD:?}
work=$(mktemp -d /tmp/lsa-gpu-XXXXXX)
trap 'rm -rf "$work"' EXIT
export LSA_BACKEND=cuda
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader

tests=("$build"/tests/t_ops_* "$build"/tests/t_oracle_indexer_grad)
for t in "${tests[@]}"; do
    "$t" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
    echo "$(basename "$t"): $(grep -a PASSED "$work/log")"
done
LSA_CURVE_DEVICES=cuda "$python" tests/oracle/test_reference_curve.py

"$bin/lsa-dump" synth --out "$work/shards" --docs 6 --tokens 1024 --layers 3 --seed 5 >/dev/null
train=("$bin/lsa-train" run --recipe recipes/smoke.yaml --data "$work/shards" --device cuda --set train.steps=60 --set train.save_every=20)
"${train[@]}" --out "$work/a" >/dev/null 2>&1
"${train[@]}" --out "$work/b" >/dev/null 2>&1
cmp "$work/a/ckpt/step_00000060/model.safetensors" "$work/b/ckpt/step_00000060/model.safetensors"
echo "two runs: bit-equal"
"${train[@]}" --out "$work/c" >/dev/null 2>&1 &
pid=$!
while [ ! -e "$work/c/ckpt/step_00000020/MANIFEST.json" ]; do kill -0 $pid 2>/dev/null || break; sleep 0.01; done
kill -KILL $pid 2>/dev/null || true
wait $pid 2>/dev/null || true
"$bin/lsa-train" resume "$work/c" --device cuda >/dev/null 2>&1
cmp "$work/a/ckpt/step_00000060/optim.safetensors" "$work/c/ckpt/step_00000060/optim.safetensors"
echo "killed and resumed: bit-equal"

if command -v compute-sanitizer >/dev/null; then
    check() { # tool command...
        local tool=$1
        shift
        timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 9 "$@" >"$work/log" 2>&1 || { tail -n 40 "$work/log"; echo "$tool: FAILED: $*"; exit 1; }
        echo "$tool $(basename "$1"): $(grep -aE 'ERROR SUMMARY|RACECHECK SUMMARY' "$work/log" | tail -1)"
    }
    for t in "${tests[@]}"; do check memcheck "$t"; done
    for tool in memcheck racecheck; do
        rm -rf "$work/s"
        check $tool "${train[@]}" --out "$work/s" --set train.steps=2 --set train.precision=f32 # the GPU step: test_gpu_step.sh
    done
    for tool in memcheck racecheck initcheck; do check $tool "$build/tests/t_gpu_gpu_retrieve" short; done
else
    echo "compute-sanitizer is not installed: memory checks not run"
fi
