#!/usr/bin/env bash
# 500 steps on the GPU in bf16 with documents resident there, against the CPU in f32: held-out captured mass within 0.5 %, on made-up and on
# the mini teacher's shards; two runs bit-equal; a rotating pool (documents read while training) bit-equal to one that holds them all,
# fp8 queries and bf16 moments close to f32. Skipped (77) without a GPU.
set -euo pipefail
. "$(dirname "$0")/../testkit/gpu.sh"
work=$(mktemp -d /tmp/lsa-gpu-XXXXXX)
trap 'rm -rf "$work"' EXIT

"$bin/lsa-dump" synth --out "$work/synth" --docs 24 --tokens 4096 --layers 3 --hidden 256 --seed 5 >/dev/null 2>&1
"$bin/lsa-dump" run --device cuda --teacher recipes/mini/teacher --tokens recipes/mini/train.u16 --needs recipes/mini/train.jsonl --documents 0:64 \
    --out "$work/mini" --shard-bytes 64M >/dev/null 2>&1
# 64 documents: with the first 16 alone, which 500 steps overfit, the same run in f32 on two CPUs ends 0.4 % apart; with 64 or more 0.1 %.
train() { # data name device options...
    local data=$1 name=$2 device=$3
    shift 3
    "$bin/lsa-train" run --data "$work/$data" --out "$work/$data-$name" --device "$device" --set model.heads=32 --set model.rank=256 \
        --set train.steps=500 --set train.batch=64 --set train.eval_every=500 --set train.save_every=500 --set sample.val_documents=8 \
        --set optim.warmup=50 "$@" >"$work/$data-$name.log" 2>&1 || { cat "$work/$data-$name.log"; exit 1; }
}
captured() { "$python" -c "
import json, sys
e = [json.loads(l) for l in open(sys.argv[1])]
print([x['eval']['sum']['captured'] for x in e if 'eval' in x][-1])" "$work/$1/metrics.jsonl"; }
close() { # a b relative what
    "$python" -c "
import sys
a, b, tol = map(float, sys.argv[1:4])
ok = abs(a - b) <= tol * abs(b)
print(f'{sys.argv[4]}: captured {a:.5f}, cpu f32 {b:.5f}, {100 * (a / b - 1):+.3f} %' + ('' if ok else ' FAILED'))
sys.exit(not ok)" "$@"
}
same() { cmp "$work/$1/ckpt/step_00000500/optim.safetensors" "$work/$2/ckpt/step_00000500/optim.safetensors" && echo "$1 and $2: bit-equal"; }

# The CPU's runs side by side from the start, a few cores each; a list of name and process.
votes=(--set loss.kind=focal --set loss.on=layer --set sample.candidates=sampled --set sample.order=shuffled --set train.pool_mib=8)
lend=(--set model.continuation=16)
share=$(($(nproc) / 5))
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=$((share > 0 ? share : 1))
declare -A pid
begin() { # data name options...
    train "$1" "$2" cpu "${@:3}" &
    pid[$1-$2]=$!
}
begin synth cpu
begin mini cpu
begin synth lend-cpu "${lend[@]}"
begin mini lend-cpu "${lend[@]}"
begin synth votes-cpu "${votes[@]}"
trap 'kill $(jobs -p) 2>/dev/null || true; wait || true; rm -rf "$work"' EXIT
like_cpu() { # run cpu-run relative what
    [ -z "${pid[$2]}" ] || wait "${pid[$2]}" || { echo "the CPU's run $2 failed"; exit 1; }
    pid[$2]=
    close "$(captured "$1")" "$(captured "$2")" "$3" "$4"
}

for data in synth mini; do
    train $data bf16 cuda
    train $data again cuda
    same $data-bf16 $data-again
    train $data fp8 cuda --set train.precision=fp8
    train $data short cuda --set optim.moments=bf16
    train $data f32 cuda --set train.precision=f32
    train $data lend-bf16 cuda "${lend[@]}"
done
train synth lend-f32 cuda "${lend[@]}" --set train.precision=f32
# Votes, sampled, shuffled: a pool that rotates, whose order is that of the small pool on the CPU too, so that they must agree.
train synth votes-gpu cuda "${votes[@]}"
train synth votes-two cuda "${votes[@]}"
same synth-votes-gpu synth-votes-two

like_cpu synth-votes-gpu synth-votes-cpu 0.01 "votes, rotating pool"
for data in synth mini; do
    like_cpu $data-bf16 $data-cpu 0.005 "$data bf16"
    like_cpu $data-fp8 $data-cpu 0.02 "$data fp8 queries"
    like_cpu $data-short $data-cpu 0.01 "$data bf16 moments"
    like_cpu $data-f32 $data-cpu 0.005 "$data f32 op by op"
    like_cpu $data-lend-bf16 $data-lend-cpu 0.01 "$data continuation, bf16"
done
like_cpu synth-lend-f32 synth-lend-cpu 0.01 "synth continuation, f32 op by op"
