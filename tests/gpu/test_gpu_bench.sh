#!/usr/bin/env bash
# lsa-decode bench on a GPU at V4-Flash's geometry and a short context: every case agrees with sums in double on the host (the program's own check), a
# budget of 1 gives full attention's checksum, bytes are what shapes say, the pool holds what it may. Skipped (77) without a GPU.
set -euo pipefail
. "$(dirname "$0")/../testkit/gpu.sh"
work=$(mktemp -d /tmp/lsa-gpu-XXXXXX)
trap 'rm -rf "$work"' EXIT

bench() { # name options...
    local name=$1
    shift
    "$bin/lsa-decode" bench --config tests/fixtures/v4-flash/config.json --json "$@" >"$work/$name" 2>"$work/log" || { cat "$work/log"; exit 1; }
}
# small heads, too: 8 index heads, an HCA ratio of its own
"$bin/lsa-decode" bench --config recipes/mini/teacher/config.json --context 16384 --batch 1,5 --pool-gb 0.05 >/dev/null 2>"$work/log" || { cat "$work/log"; exit 1; }
bench all --context 32768,131072 --batch 1,3 --budget 1 --pool-gb 0
bench part --context 32768,131072 --batch 1,3 --budget 0.1 --pool-gb 2
"$python" - "$work/all" "$work/part" <<'PY'
import json, sys
rows = [[json.loads(line) for line in open(p)] for p in sys.argv[1:]]
steps = [[r for r in x if r["case"] == "step"] for x in rows]
assert [len(x) for x in steps] == [8, 8], [len(x) for x in steps]
for x in steps:
    for f, l in zip(x[::2], x[1::2]):
        assert (f["mode"], l["mode"]) == ("full", "lsa") and (f["context"], f["batch"]) == (l["context"], l["batch"])
        chunks, m = f["context"] // 4, f["batch"]
        assert f["rows_bytes"] == m * chunks * 21 * 584 and f["keys_bytes"] == m * chunks * 21 * 132, f
        assert l["rows_bytes"] == m * l["reserve_pages"] * 64 * 21 * 584 and l["keys_bytes"] == m * l["reserve_pages"] * 64 * 18 * 132, l
        assert l["level1_keys_bytes"] == m * chunks * 3 * 132 and l["level1_us"] > 0 and f["hca_bytes"] == l["hca_bytes"] == m * chunks // 32 * 20 * 584, l
for f, l in zip(steps[0][::2], steps[0][1::2]):
    assert f["checksum"] == l["checksum"], f"a budget of 1 is not full attention at {f['context']} tokens, batch {f['batch']}"
for f, l in zip(steps[1][::2], steps[1][1::2]):
    assert f["checksum"] != l["checksum"] and l["resident_pages"] < l["reserve_pages"] and l["swap_bytes"] > 0, l
assert [f["checksum"] for f in steps[0][::2]] == [f["checksum"] for f in steps[1][::2]], "full attention differs from run to run"
pool = [r for r in rows[1] if r["case"] == "pool"]
assert [r["mode"] for r in pool] == ["full", "lsa"] and all(r["kv_bytes"] <= 2e9 and r["tokens_per_s"] > 0 for r in pool), pool
print("ok: worst logit off by", max(r["logit_off"] for x in steps for r in x), "of the rms, output by", max(r["output_off"] for x in steps for r in x))
PY
