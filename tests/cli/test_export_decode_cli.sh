#!/usr/bin/env bash
# lsa-export and lsa-decode from outside: help, exit codes, one clear message for every kind of bad input, disk full.
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/expect.sh
export OMP_NUM_THREADS=2
teacher=recipes/mini/teacher
val=(--tokens recipes/mini/val.u16 --needs recipes/mini/val.jsonl)

for sub in write verify card import; do expect 0 "Usage: lsa-export $sub" "$bin/lsa-export" $sub --help; done
for sub in validate generate bench; do expect 0 "Usage: lsa-decode $sub" "$bin/lsa-decode" $sub --help; done
for p in export decode; do
    expect 0 "lsa " "$bin/lsa-$p" --version
    expect 2 "" "$bin/lsa-$p"
    expect 2 "" "$bin/lsa-$p" fly
done

# the teacher's own indexer as a memory indexer, and a trained start from it
expect 0 "wrote" "$bin/lsa-export" import $teacher --out "$work/native"
expect 2 "" "$bin/lsa-export" import $teacher --out "$work/native"
expect 0 "" "$bin/lsa-export" write "$work/native" --out "$work/ix"
expect 2 "--force" "$bin/lsa-export" write "$work/native" --out "$work/ix"
expect 0 "" "$bin/lsa-export" write "$work/native" --out "$work/ix" --force
expect 2 "" "$bin/lsa-export" write "$work/native" --out recipes --force
expect 1 "does not exist" "$bin/lsa-export" write "$work/none" --out "$work/y"
expect 2 "" "$bin/lsa-export" write "$work/native" --out "$work/y" --ensemble median
expect 0 "ok" "$bin/lsa-export" verify "$work/ix"
expect 0 "" "$bin/lsa-export" verify "$work/ix" --checkpoint "$work/native" --json
expect 0 "Memory indexer" "$bin/lsa-export" card "$work/ix"
expect 0 "" "$bin/lsa-export" import $teacher --out "$work/one" --layers 1
expect 2 "" "$bin/lsa-export" import $teacher --out "$work/two" --layers 7
expect 0 "" "$bin/lsa-export" write "$work/one" --out "$work/ix1"
expect 3 "" "$bin/lsa-export" verify "$work/ix" --checkpoint "$work/one"

# exported files that are not what they say
edit() { # statement: edits header h, data d (bytearray) of a copy of the indexer
    rm -rf "$work/e"
    cp -r "$work/ix" "$work/e"
    "$python" - "$work/e/${2:-indexer.safetensors}" "$1" <<'PY' || bad "cannot edit: $1"
import json, struct, sys
path, statement = sys.argv[1:]
raw = open(path, "rb").read()
n = struct.unpack("<Q", raw[:8])[0]
h, d = json.loads(raw[8 : 8 + n]), bytearray(raw[8 + n :])
q = "retrievers.l1.wq_b.weight"
exec(statement)
text = json.dumps(h).encode()
open(path, "wb").write(struct.pack("<Q", len(text)) + text + d)
PY
}
decode() { expect "$1" "$2" "$bin/lsa-decode" validate --teacher $teacher "${val[@]}" --documents 0:1 --indexer "$work/e" --policy lsa; }
if [ -e "$work/ix/golden.safetensors" ]; then
    edit 'd[100] ^= 64'
    expect 3 "" "$bin/lsa-export" verify "$work/e"
    edit 'd[103] ^= 64' golden.safetensors
    expect 3 "" "$bin/lsa-export" verify "$work/e"
fi
edit 'h[q]["shape"][0] += 1'
decode 3 "wq_b"
edit 'h[q]["data_offsets"][1] += 1 << 40'
decode 3 "wq_b"
edit 'h[q]["dtype"] = "I32"'
decode 3 "wq_b"
edit 'del h[q]'
decode 3 "wq_b"
edit 'h["extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
decode 3 "extra"
edit 'd[0:4] = b"\x00\x00\xc0\x7f"' # NaN
decode 3 "finite"
edit 'h["__metadata__"] = {}'
decode 3 ""
rm "$work/e/indexer.safetensors"
decode 1 "indexer.safetensors"

# what validate refuses before it runs anything
validate=("$bin/lsa-decode" validate --teacher $teacher "${val[@]}" --documents 0:1)
expect 2 "--indexer" "${validate[@]}" --policy lsa
expect 2 "recent" "${validate[@]}" --policy full,recent
expect 1 "quest" "${validate[@]}" --policy quest
for b in 0 1.5 x -0.1 ""; do expect 2 "" "${validate[@]}" --policy recency --budget "$b"; done
expect 2 "--tau" "${validate[@]}" --policy recency --tau 0
expect 2 "--device" "${validate[@]}" --policy recency --device tpu
expect 2 "--device cuda" "${validate[@]}" --policy recency --storage tiered
expect 2 "--storage" "${validate[@]}" --policy recency --storage disk
expect 2 "" "$bin/lsa-decode" validate --teacher $teacher
expect 1 "none" "$bin/lsa-decode" validate --teacher "$work/none" "${val[@]}" --policy full
expect 2 "" "$bin/lsa-decode" validate --teacher $teacher "${val[@]}" --documents 90:99
"$bin/lsa-dump" synth --out "$work/syn" --docs 4 --tokens 640 --layers 2 --hidden 32 >/dev/null 2>&1
"$bin/lsa-train" run --recipe recipes/smoke.yaml --data "$work/syn" --out "$work/other" --device cpu --set train.steps=1 --set sample.val_documents=0 \
    --set train.eval_every=0 >/dev/null 2>&1
expect 0 "" "$bin/lsa-export" write "$work/other" --out "$work/ixo"
expect 2 "the teacher has 256" "${validate[@]}" --policy lsa --indexer "$work/ixo"

# short documents: a token, less than a window, nothing that could be evicted
"$python" - "$work" <<'PY'
import array, json, sys
ids = array.array("H")
ids.frombytes(open("recipes/mini/val.u16", "rb").read(2 * 1500))
with open(sys.argv[1] + "/short.jsonl", "w") as f:
    for n in (1, 2, 40, 64, 65, 300):
        print(json.dumps({"tokens": list(ids[:n])}), file=f)
PY
expect 0 '"captured": null' "$bin/lsa-decode" validate --teacher $teacher --tokens "$work/short.jsonl" --documents 0:3 --indexer "$work/ix" \
    --policy full,lsa,recency --json
expect 0 "recency" "$bin/lsa-decode" validate --teacher $teacher --tokens "$work/short.jsonl" --indexer "$work/ix" --policy full,dense,lsa,oracle,recency \
    --report "$work/report"
"$python" - "$work/report/report.json" <<'PY' || bad "report.json of short documents"
import json, sys
r = json.load(open(sys.argv[1]))
assert r["format"] == "lsa-report/1" and len(r["rows"]) == 5
full = r["rows"][0]
assert full["nll_answer"] is None and full["tokens"] == 0 + 1 + 39 + 63 + 64 + 299
PY

# everything resident is full attention, bit for bit; threshold and top-k replace the budget
"$bin/lsa-decode" validate --teacher $teacher "${val[@]}" --documents 0:1 --indexer "$work/ix" --policy full,lsa,random --budget 1 --json >"$work/all" 2>/dev/null
"$python" - "$work/all" <<'PY' || bad "a budget of 1 is not full attention"
import json, sys
full, lsa, rnd = (json.loads(line) for line in open(sys.argv[1]))
for r in (lsa, rnd):
    assert r["nll"] == full["nll"] and r["captured"] == 1 and r["misses_per_window"] == 0 and r["kl"] == 0 and r["gpu_bytes"] == full["gpu_bytes"], r
PY
expect 0 '"budget": null' "${validate[@]}" --indexer "$work/ix" --policy lsa --top-k 50 --json
expect 0 '"budget": null' "${validate[@]}" --indexer "$work/ix" --policy lsa --threshold 0.5 --json

# generate: with everything resident the text of full attention; with an indexer it runs
gen=("$bin/lsa-decode" generate --teacher $teacher "${val[@]}" --documents 0:1 --prompt 700 --new 24)
expect 0 "" "${gen[@]}" --json
cp "$work/out" "$work/g1"
expect 0 "" "${gen[@]}" --indexer "$work/ix" --budget 1 --json
"$python" - "$work/g1" "$work/out" <<'PY' || bad "generate with everything resident differs from full attention"
import json, sys
a, b = (json.loads([line for line in open(p) if line.startswith("{")][-1]) for p in sys.argv[1:])
assert a["tokens"] == b["tokens"] and len(a["tokens"]) == 24
PY
expect 0 "" "${gen[@]}" --indexer "$work/ix"
expect 2 "" "${gen[@]}" --policy lsa
expect 2 "" "$bin/lsa-decode" generate --teacher $teacher "${val[@]}" --prompt 0

# bench: what it refuses; without a GPU it says so
bench=("$bin/lsa-decode" bench --config tests/fixtures/v4-flash/config.json)
expect 2 "--config" "$bin/lsa-decode" bench
expect 1 "none" "$bin/lsa-decode" bench --config "$work/none"
for b in 0 1.5 -1; do expect 2 "--budget" "${bench[@]}" --budget "$b"; done
for c in "" x 1000 65536,32768 1024,1024; do expect 2 "--context" "${bench[@]}" --context "$c"; done
for b in 0 8,1 1,2,3,4,5,6,7,8,9; do expect 2 "--batch" "${bench[@]}" --batch "$b"; done
expect 2 "--pool-gb" "${bench[@]}" --pool-gb -1
expect 2 "measures a GPU" "${bench[@]}" --device cpu
nvidia-smi -L >/dev/null 2>&1 || expect 4 "bench measures a GPU" "${bench[@]}"

# disk full: exit 4 and nothing under the final name
(ulimit -f 20; exec "$bin/lsa-export" write "$work/native" --out "$work/small" >"$work/out" 2>&1)
rc=$?
[ $rc = 4 ] || { bad "disk full gave exit $rc"; cat "$work/out"; }
[ ! -e "$work/small" ] || bad "an export that did not fit has its final name"
(ulimit -f 1; exec "${validate[@]}" --policy full,recency --report "$work/r2" >"$work/out" 2>&1)
rc=$?
[ $rc = 4 ] || { bad "disk full gave exit $rc"; cat "$work/out"; }
[ ! -e "$work/r2/report.html" ] || bad "a report that did not fit has its final name"
verdict
