#!/usr/bin/env bash
# lsa-train from outside: help, exit codes, one clear message for every kind of bad input, stop and resume, disk full.
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/expect.sh
export OMP_NUM_THREADS=1
errors_once() { [ "$(grep -c 'error:' "$work/out")" = 1 ] || { bad "not exactly one error line"; cat "$work/out"; }; }

for sub in run resume eval config; do expect 0 "Usage: lsa-train $sub" "$bin/lsa-train" $sub --help; done
expect 0 "lsa " "$bin/lsa-train" --version
expect 2 "" "$bin/lsa-train"
expect 2 "" "$bin/lsa-train" fly
expect 2 "" "$bin/lsa-train" run --nonsense
expect 2 "--data and --out" "$bin/lsa-train" run

# config: what it prints is a recipe that resolves to itself
"$bin/lsa-train" config --set train.steps=123 >"$work/a.yaml" || bad "config"
"$bin/lsa-train" config --recipe "$work/a.yaml" >"$work/b.yaml" || bad "config of its own output"
cmp "$work/a.yaml" "$work/b.yaml" || bad "config does not round-trip"
grep -q "steps: 123 .*default 1000" "$work/a.yaml" || bad "config shows no default"
expect 2 "did you mean 'train.steps'" "$bin/lsa-train" config --set train.stesp=3
expect 2 "must be an integer" "$bin/lsa-train" config --set train.steps=1e3
expect 2 "recipes/reference.yaml" "$bin/lsa-train" config --set train.mode=reference

# config --estimate: every number says where it comes from
estimate=("$bin/lsa-train" config --recipe recipes/v4-flash-joint8.yaml --estimate)
expect 0 "339.8 M parameters" "${estimate[@]}" gpus=1,windows=338880
for what in "AdamW  .*3.550  measured" "one pass over 338880 windows"; do grep -q "$what" "$work/out" || bad "no '$what' in the estimate"; done
if grep -q "assumed" "$work/out"; then bad "one GPU needs no assumption about communication"; fi
expect 0 "more is a plan" "${estimate[@]}" gpus=16,nodes=2 --set optim.zero1=true --set data.virtual_shards=16
[ "$(grep -c "between GPUs.*assumed" "$work/out")" = 2 ] || bad "communication is not marked as assumed"
expect 0 "more is a plan" "${estimate[@]}" gpus=8 --set optim.zero1=true
[ "$(grep -c "between GPUs.*scaled" "$work/out")" = 2 ] || bad "communication in a node is not marked as scaled"
expect 0 "communication_share" "${estimate[@]}" gpus=8 --json
"$python" - "$work/out" <<'PY' ||
import json, sys
e = json.load(open(sys.argv[1]))
assert e["from"]["reduce"] == "scaled" and 0 < e["communication_share"] < 1
assert abs(sum(e["ms"].values()) - e["step_ms"]) < 1e-6
PY
    bad "config --estimate --json"
expect 2 "unknown key 'gpu'" "${estimate[@]}" gpu=8
expect 2 "data.virtual_shards=9" "${estimate[@]}" gpus=3
expect 2 "go with --estimate" "$bin/lsa-train" config --json

"$bin/lsa-dump" synth --out "$work/shards" --docs 6 --tokens 1024 --layers 3 --seed 5 >/dev/null || bad "synth"
expect 0 "3 joint layers, 8 heads, rank 32, hidden 64" "$bin/lsa-train" config --recipe recipes/smoke.yaml --data "$work/shards" --estimate gpus=1
grep -q "one pass over [1-9]" "$work/out" || bad "the estimate does not count the shards' windows"
expect 2 "no window" "$bin/lsa-train" config --set window.tail=4096 --data "$work/shards" --estimate gpus=1
run=("$bin/lsa-train" run --recipe recipes/smoke.yaml --data "$work/shards" --device cpu --set train.batch=8)
printf 'train:\n  stesp: 4\n' >"$work/bad.yaml"
expect 2 "did you mean 'train.steps'" "$bin/lsa-train" run --recipe "$work/bad.yaml" --data "$work/shards" --out "$work/r0"
errors_once
expect 1 "" "$bin/lsa-train" run --recipe "$work/none.yaml" --data "$work/shards" --out "$work/r0"
expect 2 "hidden-stride 1" "$bin/lsa-train" run --recipe recipes/reference.yaml --data "$work/shards" --out "$work/r0"
expect 2 "model.layers" "${run[@]}" --out "$work/r0" --set model.layers=0,7
expect 2 "no window" "${run[@]}" --out "$work/r0" --set sample.val_documents=6
expect 2 "no window" "${run[@]}" --out "$work/r0" --set window.tail=4096
expect 2 "pairwise" "${run[@]}" --out "$work/r0" --set loss.kind=bpr
expect 2 "dense" "${run[@]}" --out "$work/r0" --set loss.target=dense
expect 2 "stride" "${run[@]}" --out "$work/r0" --set window.stride=48
errors_once
[ ! -e "$work/r0" ] || bad "a refused run left its folder"
if [ "$("$bin/lsa-train" --version | grep -c 'CUDA.*OFF')" = 1 ]; then
    expect 4 "CUDA" "$bin/lsa-train" run --recipe recipes/smoke.yaml --data "$work/shards" --out "$work/r0" --device cuda
fi

# a run, what it leaves, and commands on it
expect 0 "" "${run[@]}" --out "$work/r1"
for f in run.json recipe.yaml metrics.jsonl ckpt/latest ckpt/best; do [ -e "$work/r1/$f" ] || bad "$f is missing"; done
"$python" - "$work/r1/metrics.jsonl" <<'PY' || bad "metrics.jsonl is not JSON lines with losses and evaluations"
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
assert [r["step"] for r in rows if "loss" in r] == [10, 20, 30, 40, 50, 60]
assert [r["step"] for r in rows if "eval" in r] == [30, 60]
PY
"$bin/lsa-train" config --recipe "$work/r1/recipe.yaml" >/dev/null || bad "the written recipe does not load"
expect 2 "resume" "${run[@]}" --out "$work/r1"
expect 0 "nothing to resume" "$bin/lsa-train" resume "$work/r1" --device cpu
expect 1 "not a run" "$bin/lsa-train" resume "$work/shards" --device cpu
for what in r1 r1/ckpt/latest r1/ckpt/best r1/ckpt/step_00000060; do
    expect 0 "captured" "$bin/lsa-train" eval "$work/$what" --data "$work/shards" --device cpu
done
expect 0 '"sum"' "$bin/lsa-train" eval "$work/r1" --data "$work/shards" --device cpu --json
"$python" -c "import json, sys; e = json.load(open(sys.argv[1])); assert 0 < e['sum']['captured_0.10'] <= 1 and 'c0' in e" "$work/out" ||
    bad "eval --json"
expect 1 "does not exist" "$bin/lsa-train" eval "$work/none" --data "$work/shards"

# start from a checkpoint: wider computes the same; narrower and missing layers are refused
evaluation() { "$bin/lsa-train" eval "$1" --data "$work/shards" --device cpu --json; }
expect 0 "" "${run[@]}" --out "$work/wide" --init "$work/r1/ckpt/latest" --set model.heads=16 --set model.rank=64 --set train.steps=1 \
    --set optim.lr=0 --set optim.weight_decay=0
evaluation "$work/r1/ckpt/latest" >"$work/e1"
evaluation "$work/wide" >"$work/e2"
"$python" - "$work/e1" "$work/e2" <<'PY' || bad "widening changed the indexer"
import json, sys
a, b = (json.load(open(p))["sum"] for p in sys.argv[1:])
assert all(abs(a[k] - b[k]) <= 1e-3 * max(1, abs(a[k])) for k in a), (a, b)
PY
expect 0 "" "${run[@]}" --out "$work/sub" --init "$work/r1" --set model.layers=0,2 --set train.steps=1
expect 2 "rank" "${run[@]}" --out "$work/r2" --init "$work/r1" --set model.rank=16
expect 2 "CSA layer 1" "${run[@]}" --out "$work/r2" --init "$work/sub"

# SIGTERM: saved, exit 5, and resume ends where an uninterrupted run ends
long=("${run[@]}" --set train.steps=3000 --set train.eval_every=0 --set train.save_every=3000 --set train.log_every=1000)
"${long[@]}" --out "$work/stopped" >"$work/out" 2>&1 &
pid=$!
while [ ! -e "$work/stopped/metrics.jsonl" ]; do sleep 0.02; done
sleep 0.3
kill -TERM $pid
wait $pid
rc=$?
if [ $rc = 5 ]; then
    grep -q "lsa-train resume" "$work/out" || bad "the stop message does not say how to go on"
    expect 0 "" "$bin/lsa-train" resume "$work/stopped" --device cpu
    "${long[@]}" --out "$work/through" >/dev/null 2>&1
    cmp "$work/stopped/ckpt/step_00003000/model.safetensors" "$work/through/ckpt/step_00003000/model.safetensors" &&
        cmp "$work/stopped/ckpt/step_00003000/state.json" "$work/through/ckpt/step_00003000/state.json" || bad "stop and resume changed the result"
else
    bad "SIGTERM gave exit $rc"
fi

# disk full (file-size limit): exit 4, the checkpoint before is whole, and resume goes on once there is room
"${run[@]}" --out "$work/full" --set train.steps=40 --set train.save_every=20 --set train.keep=9 --set train.eval_every=0 --set model.rank=48 >/dev/null 2>&1
cp -r "$work/full" "$work/full2"
rm -rf "$work/full2/ckpt/step_00000040"
echo step_00000020 >"$work/full2/ckpt/latest"
rm -f "$work/full2/ckpt/best"
(ulimit -f 100; "$bin/lsa-train" resume "$work/full2" --device cpu >"$work/out" 2>&1)
rc=$?
[ $rc = 4 ] || { bad "disk full gave exit $rc"; cat "$work/out"; }
grep -q "step 20 is the last good one" "$work/out" || { bad "the message does not name the last good checkpoint"; cat "$work/out"; }
ls "$work/full2/ckpt" | grep -qx step_00000040 && bad "a checkpoint that did not fit has its final name"
expect 0 "" "$bin/lsa-train" resume "$work/full2" --device cpu
cmp "$work/full/ckpt/step_00000040/model.safetensors" "$work/full2/ckpt/step_00000040/model.safetensors" || bad "after the full disk the result differs"

# a damaged latest checkpoint: resume warns, goes on from the one before, and ends at the same bytes; with no other left, exit 3
for file in model.safetensors optim.safetensors state.json MANIFEST.json; do
    rm -rf "$work/hurt"
    cp -r "$work/full" "$work/hurt"
    printf 'XX' | dd of="$work/hurt/ckpt/step_00000040/$file" bs=1 seek=100 conv=notrunc 2>/dev/null
    expect 0 "step_00000020' instead" "$bin/lsa-train" resume "$work/hurt" --device cpu
    cmp "$work/full/ckpt/step_00000040/$file" "$work/hurt/ckpt/step_00000040/$file" || bad "after a damaged $file the result differs"
done
printf 'XX' | dd of="$work/hurt/ckpt/step_00000040/optim.safetensors" bs=1 seek=100 conv=notrunc 2>/dev/null
rm -rf "$work/hurt/ckpt/step_00000020"
expect 3 "no checkpoint before it is left" "$bin/lsa-train" resume "$work/hurt" --device cpu

# milestones stay whatever train.keep says
expect 0 "" "${run[@]}" --out "$work/miles" --set train.steps=30 --set train.save_every=5 --set train.keep=1 --set train.milestone_every=15 --set train.eval_every=0
[ "$(cd "$work/miles/ckpt" && echo step_*)" = "step_00000015 step_00000030" ] || bad "milestones: $(ls "$work/miles/ckpt")"

# damaged input: a cut shard, other shards than the run's, a non-finite batch
cp -r "$work/shards" "$work/cut"
f=$(ls "$work"/cut/*.h5 | head -1)
truncate -s -1000 "$f"
expect 3 "$(basename "$f")" "$bin/lsa-train" run --recipe recipes/smoke.yaml --data "$work/cut" --out "$work/r3" --device cpu
"$bin/lsa-dump" synth --out "$work/other" --docs 6 --tokens 1024 --layers 3 --seed 6 >/dev/null
cp -r "$work/full2" "$work/moved"
echo step_00000020 >"$work/moved/ckpt/latest"
sed -i "s#$work/shards#$work/other#" "$work/moved/run.json"
expect 3 "not those of the checkpoint" "$bin/lsa-train" resume "$work/moved" --device cpu
cp -r "$work/shards" "$work/inf"
"$python" - "$work"/inf/*.h5 <<'PY'
import h5py, sys
with h5py.File(sys.argv[1], "r+") as f:
    f["hidden/c0"][...] = 0x7F80  # infinity in bf16
PY
[ $? = 0 ] || bad "h5py could not write the shard"
expect 6 "not finite" "$bin/lsa-train" run --recipe recipes/smoke.yaml --data "$work/inf" --out "$work/r4" --device cpu --set train.max_bad=3
grep -q "document" "$work/out" || bad "the skipped batch is not named"

verdict
