#!/usr/bin/env bash
# 500 steps on the GPU in bf16 with documents resident there, against the CPU in f32: held-out captured mass within 0.5 %, on made-up and on
# the mini teacher's shards; two runs bit-equal; a rotating pool (documents read while training) bit-equal to one that holds them all,
# fp8 queries and bf16 moments close to f32. Skipped (77) without a GPU.
set -euo pipefail
. "$(dirname "$0")/../testkit/gpu.sh"
work=$(mktemp -d /tmp/lsa-gpu-XXXXXX)
trap 'rm -rf "$work"' EXIT

"$bin/lsa-dump" synth --out "$work/synth" --docs 24 --tokens 4096 --layers 3 --hidden 256 --seed 5 >/dev/null 2>&1
"$bin/lsa-dump" run --teacher recipes/mini/teacher --tokens recipes/mini/train.u16 --needs recipes/mini/train.jsonl --documents 0:16 \
    --out "$work/mini" --shard-bytes 64M >/dev/null 2>&1
train() { # data name device options...
    local data=$1 name=$2 device=$3
    shift 3
    "$bin/lsa-train" run --data "$work/$data" --out "$work/$data-$name" --device "$device" --set model.heads=32 --set model.rank=256 \
        --set train.steps=500 --set train.batch=32 --set train.eval_every=500 --set train.save_every=500 --set sample.val_documents=4 \
        --set optim.warmup=50 "$@" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
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

for data in synth mini; do
    train $data cpu cpu &
    pid=$!
    train $data bf16 cuda
    train $data again cuda
    wait $pid
    same $data-bf16 $data-again
    cpu=$(captured $data-cpu)
    close "$(captured $data-bf16)" "$cpu" 0.005 "$data bf16"
    train $data fp8 cuda --set train.precision=fp8
    close "$(captured $data-fp8)" "$cpu" 0.02 "$data fp8 queries"
    train $data short cuda --set optim.moments=bf16
    close "$(captured $data-short)" "$cpu" 0.01 "$data bf16 moments"
    train $data f32 cuda --set train.precision=f32
    close "$(captured $data-f32)" "$cpu" 0.005 "$data f32 op by op"
done
# A continuation: op by op in f32 and in the fused step as on the CPU.
train synth lend-cpu cpu --set model.continuation=16
train synth lend-f32 cuda --set model.continuation=16 --set train.precision=f32
close "$(captured synth-lend-f32)" "$(captured synth-lend-cpu)" 0.01 "continuation, f32 op by op"
train synth lend-bf16 cuda --set model.continuation=16
close "$(captured synth-lend-bf16)" "$(captured synth-lend-cpu)" 0.01 "continuation, bf16"
train mini lend-cpu cpu --set model.continuation=16
train mini lend-bf16 cuda --set model.continuation=16
close "$(captured mini-lend-bf16)" "$(captured mini-lend-cpu)" 0.01 "continuation, mini teacher, bf16"
# Votes, sampled, shuffled: a pool of all documents against one that rotates; the order is that of the small pool in both, so that they
# must agree with the CPU's sampling too.
votes=(--set loss.kind=focal --set loss.on=layer --set sample.candidates=sampled --set sample.order=shuffled --set train.pool_mib=8)
train synth votes-cpu cpu "${votes[@]}"
train synth votes-gpu cuda "${votes[@]}"
train synth votes-two cuda "${votes[@]}"
same synth-votes-gpu synth-votes-two
close "$(captured synth-votes-gpu)" "$(captured synth-votes-cpu)" 0.01 "votes, rotating pool"
