#!/usr/bin/env bash
# What checkpoints cost a run on a GPU: 8 layers, 128 heads, rank 2048 (340 M parameters, 4 GB a checkpoint), 256 windows a step. One every 1,000
# steps, or as often as this disk can take them. One JSON line: the rate of the steps between two checkpoints, the snapshot of the first and its
# way to the disk included, against the rate without. Skipped (77) without a GPU.
set -euo pipefail
. "$(dirname "$0")/../testkit/gpu.sh"
work=$(mktemp -d "${TMPDIR:-/tmp}/lsa-bench-XXXXXX")
trap 'rm -rf "$work"' EXIT
"$bin/lsa-dump" synth --out "$work/shards" --docs 8 --tokens 16384 --layers 8 --hidden 4096 --seed 5 >/dev/null 2>&1
t0=$(date +%s.%N)
dd if=/dev/zero of="$work/disk" bs=16M count=243 conv=fsync status=none
disk_s=$("$python" -c "print(round($(date +%s.%N) - $t0, 3))")
rm "$work/disk"
train() { # name steps save_every
    "$bin/lsa-train" run --data "$work/shards" --out "$work/$1" --device cuda --set model.heads=128 --set model.rank=2048 --set train.steps="$2" \
        --set train.batch=256 --set train.log_every="$((${2} / 2))" --set train.eval_every=0 --set sample.val_documents=0 --set train.save_every="$3" \
        --set sample.candidates=sampled --set loss.kind=focal --set loss.on=layer >"$work/$1.log" 2>&1 || { cat "$work/$1.log"; exit 1; }
}
rate() { "$python" -c "import json, sys; print([json.loads(l)['windows_per_s'] for l in open('$work/$1/metrics.jsonl')][-1])"; }
train without 2000 1000000
without=$(rate without)
every=$("$python" -c "print(max(1000, int(1.5 * $disk_s * $without / 256 / 100) * 100))") # reading back and hashing take their part
train with "$((2 * every))" "$every"
"$python" - "$every" "$disk_s" "$without" "$(rate with)" "$(grep -o 'checkpoints; steps waited [0-9.]*' "$work/with.log" | grep -o '[0-9.]*$')" <<'PY'
import json, sys
every, disk_s, without, rate, waited = map(float, sys.argv[1:])
print(json.dumps({"bench": "checkpoint", "parameters": 339787776, "bytes": 4077453312, "disk_s": disk_s, "every": int(every), "windows_per_s": rate,
                  "windows_per_s_without": without, "cost": round(1 - rate / without, 5), "waited_s_for_two": waited}))
PY
