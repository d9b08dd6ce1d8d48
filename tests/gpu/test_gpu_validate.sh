#!/usr/bin/env bash
# lsa-decode validate --device cuda against the CPU's on 2 planted documents, all policies: losses, recall, captured mass and misses agree; a budget of
# 1 gives full attention's numbers exactly. With rows and keys in host memory the numbers of the same bytes on the GPU, exactly. Skipped (77) without a GPU.
set -euo pipefail
. "$(dirname "$0")/../testkit/gpu.sh"
work=$(mktemp -d /tmp/lsa-gpu-XXXXXX)
trap 'rm -rf "$work"' EXIT

"$bin/lsa-export" import recipes/mini/teacher --out "$work/native" >/dev/null 2>&1
"$bin/lsa-export" write "$work/native" --out "$work/ix" >/dev/null 2>&1
validate() { # name device policies options...
    local name=$1 device=$2 policies=$3 t0=$SECONDS
    shift 3
    "$bin/lsa-decode" validate --teacher recipes/mini/teacher --tokens recipes/mini/val.u16 --needs recipes/mini/val.jsonl --documents 0:2 \
        --indexer "$work/ix" --policy "$policies" --budget 0.10,1 --device "$device" "$@" --json >"$work/$name" 2>"$work/log" || { cat "$work/log"; exit 1; }
    echo "$name: $((SECONDS - t0)) s"
}
every=full,dense,lsa,oracle,recency,random,untrained,last,last-spread
validate cpu cpu $every
validate cuda cuda $every
validate server cuda full,lsa,random --storage server
validate tiered cuda full,lsa,random --storage tiered
validate pages cuda full,lsa,random --storage tiered --page 64
"$python" - "$work/cpu" "$work/cuda" <<'PY'
import json, sys
a, b = ([json.loads(line) for line in open(p) if line.startswith("{")] for p in sys.argv[1:])
assert len(a) == len(b) == 16, (len(a), len(b))
bad = 0
full = b[0]
for x, y in zip(a, b):
    name = f"{x['policy']} {x['budget']}"
    assert (x["policy"], x["budget"], x["tokens"], x["gpu_bytes"]) == (y["policy"], y["budget"], y["tokens"], y["gpu_bytes"]), name
    for key, most in ("nll", 2e-3), ("nll_other", 5e-3), ("nll_replay", 2e-2), ("nll_answer", 5e-2), ("recalled", 0.02), ("captured", 2e-3), ("kept", 1e-6):
        if not abs(x[key] - y[key]) <= most:
            bad += 1
            print(f"{name}: {key} {x[key]} on the CPU, {y[key]} on the GPU: FAILED")
    if not abs(x["misses_per_window"] - y["misses_per_window"]) <= 0.01 * x["misses_per_window"]:
        bad += 1
        print(f"{name}: misses {x['misses_per_window']} and {y['misses_per_window']}: FAILED")
    if x["budget"] == 1 and (y["nll"] != full["nll"] or y["kl"] != 0 or y["misses_per_window"] != 0):
        bad += 1
        print(f"{name}: not full attention's bits: FAILED")
    print(f"{name:18} nll {x['nll']:.5f} {y['nll']:.5f}, recalled {x['recalled']:.3f} {y['recalled']:.3f}, captured {x['captured']:.4f} {y['captured']:.4f}")
sys.exit(bad)
PY
"$python" - "$work/server" "$work/tiered" "$work/pages" <<'PY'
import json, sys
a, b, c = ([json.loads(line) for line in open(p) if line.startswith("{")] for p in sys.argv[1:])
assert len(a) == len(b) == len(c) == 5
bad = 0
for x, y, z in zip(a, b, c):
    name = f"{x['policy']} {x['budget']}"
    for key in "nll", "nll_answer", "nll_replay", "nll_other", "recalled", "kl", "kept", "captured":
        if not x[key] == y[key] == z[key]:
            bad += 1
            print(f"{name}: {key} {x[key]} on the GPU, {y[key]} tiered, {z[key]} in pages of 64: FAILED")
    if x["budget"] == 0.1 and not y["measured_rows_bytes"] < 0.25 * x["measured_rows_bytes"]:
        bad += 1
        print(f"{name}: {y['measured_rows_bytes']} bytes of rows, all are {x['measured_rows_bytes']}: FAILED")
    print(f"{name}: rows {y['measured_rows_bytes']} of {x['measured_rows_bytes']}, keys {y['measured_keys_bytes']} of {x['measured_keys_bytes']}, swapped "
          f"{y['swapped_bytes_per_window']:.0f} and {z['swapped_bytes_per_window']:.0f} a window")
sys.exit(bad)
PY
