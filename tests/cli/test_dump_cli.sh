#!/usr/bin/env bash
# lsa-dump from outside: help, exit codes, one clear message for every kind of bad input, stop and resume, disk full.
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/expect.sh
export OMP_NUM_THREADS=2
teacher=recipes/mini/teacher

for sub in run resume synth verify info plan bench; do expect 0 "Usage: lsa-dump $sub" "$bin/lsa-dump" $sub --help; done
expect 0 "lsa " "$bin/lsa-dump" --version
expect 2 "" "$bin/lsa-dump"
expect 2 "" "$bin/lsa-dump" fly
expect 2 "--teacher, --tokens and --out" "$bin/lsa-dump" run
expect 4 "GPU 0" "$bin/lsa-dump" run --teacher $teacher --tokens recipes/mini/val.u16 --out "$work/x" --device cuda

expect 2 "--config is required" "$bin/lsa-dump" bench
expect 2 "--memory-cap" "$bin/lsa-dump" bench --config tests/fixtures/v4-flash/config.json --memory-cap 0
expect 4 "GPU 0" "$bin/lsa-dump" bench --config tests/fixtures/v4-pro/config.json --json

# documents: made small from the mini teacher's text
"$python" - "$work" <<'PY' || bad "cannot make the documents"
import array, json, sys
w = sys.argv[1]
ids = array.array("H")
ids.frombytes(open("recipes/mini/train.u16", "rb").read(2 * 4096))
ids = list(ids)
def lines(name, docs):
    with open(f"{w}/{name}.jsonl", "w") as f:
        for d in docs:
            print(json.dumps({"tokens": d}), file=f)
lines("good", [ids[i * 600 : i * 600 + 500] for i in range(4)])
lines("long", [ids[:2100]])
lines("empty", [ids[:100], []])
lines("short", [ids[:40]])
lines("high", [ids[:10] + [4096]])
lines("negative", [[-1, 2]])
open(f"{w}/broken.jsonl", "w").write('{"tokens": [1, 2')
open(f"{w}/odd.u16", "wb").write(b"\x01\x00\x02")
open(f"{w}/nothing.u16", "wb").write(b"")
open(f"{w}/needs.jsonl", "w").write('{"document": 0, "start": 0, "tokens": 99999999, "facts": [], "replays": []}\n')
PY
dump=("$bin/lsa-dump" run --teacher $teacher)
expect 0 "" "$bin/lsa-dump" plan --teacher $teacher --tokens "$work/good.jsonl" --out "$work/shards"
[ ! -e "$work/shards" ] || bad "plan wrote something"
expect 0 '"disk_bytes"' "$bin/lsa-dump" plan --teacher $teacher --tokens "$work/good.jsonl" --out "$work/shards" --json
expect 0 "sealed" "${dump[@]}" --tokens "$work/good.jsonl" --out "$work/shards" --shard-bytes 200K
expect 2 "already holds" "${dump[@]}" --tokens "$work/good.jsonl" --out "$work/shards"
expect 0 "" "$bin/lsa-dump" verify "$work/shards"
expect 0 "documents" "$bin/lsa-dump" info "$work/shards"
expect 0 "" "$bin/lsa-dump" resume "$work/shards"
expect 3 "empty" "${dump[@]}" --tokens "$work/empty.jsonl" --out "$work/x"
expect 3 "4096" "${dump[@]}" --tokens "$work/high.jsonl" --out "$work/x"
expect 3 "" "${dump[@]}" --tokens "$work/negative.jsonl" --out "$work/x"
expect 3 "broken.jsonl" "${dump[@]}" --tokens "$work/broken.jsonl" --out "$work/x"
expect 3 "odd.u16" "${dump[@]}" --tokens "$work/odd.u16" --out "$work/x"
expect 3 "nothing.u16" "${dump[@]}" --tokens "$work/nothing.u16" --out "$work/x"
expect 3 "needs.jsonl" "${dump[@]}" --tokens recipes/mini/val.u16 --needs "$work/needs.jsonl" --out "$work/x"
expect 1 "none.u16" "${dump[@]}" --tokens "$work/none.u16" --out "$work/x"
expect 2 "" "${dump[@]}" --tokens "$work/good.jsonl" --documents 3:1 --out "$work/x"
expect 2 "" "${dump[@]}" --tokens "$work/good.jsonl" --documents 9:12 --out "$work/x"
[ ! -e "$work/x" ] || bad "a refused dump left its folder"

# a document shorter than a window is dumped, and training on it alone says why it cannot
expect 0 "" "${dump[@]}" --tokens "$work/short.jsonl" --out "$work/short"
expect 0 "" "$bin/lsa-dump" verify "$work/short"
expect 2 "no window" "$bin/lsa-train" run --recipe recipes/smoke.yaml --data "$work/short" --out "$work/r" --device cpu

# teachers that are not what they say
damaged() { # name python-statement: edits header h (dict) of the second file; may change config c
    rm -rf "$work/t"
    cp -r $teacher "$work/t"
    chmod -R u+w "$work/t"
    "$python" - "$work/t" "$2" <<'PY' || bad "cannot damage the teacher: $1"
import glob, json, struct, sys
d, statement = sys.argv[1:]
path = sorted(glob.glob(d + "/model-*.safetensors"))[-1]
raw = open(path, "rb").read()
n = struct.unpack("<Q", raw[:8])[0]
h, c = json.loads(raw[8 : 8 + n]), json.load(open(d + "/config.json"))
name = next(k for k in h if k.endswith("attn.indexer.wq_b.weight"))
exec(statement)
json.dump(c, open(d + "/config.json", "w"))
text = json.dumps(h).encode()
open(path, "wb").write(struct.pack("<Q", len(text)) + text + raw[8 + n :])
PY
}
refuse() { expect 3 "$1" "$bin/lsa-dump" run --teacher "$work/t" --tokens "$work/good.jsonl" --out "$work/x"; }
damaged "offsets beyond the file" 'h[name]["data_offsets"][1] += 1 << 40'
refuse "indexer.wq_b"
damaged "shape that does not fit its bytes" 'h[name]["shape"][0] += 1'
refuse "indexer.wq_b"
damaged "another dtype" 'h[name]["dtype"] = "I16"'
refuse "indexer.wq_b"
damaged "a missing tensor" 'del h[name]'
refuse "indexer.wq_b"
damaged "two tensors on the same bytes" 'o = h[next(k for k in h if k.endswith("norm.weight"))]; at = h[name]["data_offsets"][0]; o["data_offsets"] = [at, at + o["data_offsets"][1] - o["data_offsets"][0]]'
refuse ""
damaged "another width" 'c["hidden_size"] *= 2'
refuse ""
damaged "a missing key of the config" 'del c["num_hidden_layers"]'
refuse "num_hidden_layers"
truncate -s -5000 "$(ls "$work"/t/model-*.safetensors | head -1)"
refuse ""
rm "$work/t/config.json"
expect 1 "config.json" "$bin/lsa-dump" run --teacher "$work/t" --tokens "$work/good.jsonl" --out "$work/x"
[ ! -e "$work/x" ] || bad "a refused teacher left a shard folder"

# shards: cut, a flipped bit in every kind of place, a missing one
shard=$(ls "$work"/shards/*.h5 | head -1)
name=$(basename "$shard")
hurt() { rm -rf "$work/h"; cp -r "$work/shards" "$work/h"; }
flip() { "$python" -c "
import sys
p, at = sys.argv[1], int(sys.argv[2])
b = bytearray(open(p, 'rb').read())
b[at] ^= 0x10
open(p, 'wb').write(b)" "$1" "$2"; }
hurt
truncate -s -777 "$work/h/$name"
expect 3 "$name" "$bin/lsa-dump" verify "$work/h"
hurt
rm "$work/h/$name"
expect 3 "$name" "$bin/lsa-dump" verify "$work/h"
size=$(stat -c %s "$shard")
for at in 0 9 2000 $((size / 4)) $((size / 2)) $((size * 3 / 4)) $((size - 1)); do
    hurt
    flip "$work/h/$name" "$at"
    expect 3 "$name" "$bin/lsa-dump" verify "$work/h"
done
# native logits from stored keys, where there is something to choose from
expect 0 "" "$bin/lsa-dump" run --teacher $teacher --tokens "$work/long.jsonl" --out "$work/long"
expect 0 "rows with more than 256 visible chunks: r at least 0.999" "$bin/lsa-dump" verify "$work/long"
expect 2 "--streams must be f32 or bf16" "$bin/lsa-dump" run --teacher $teacher --tokens "$work/long.jsonl" --out "$work/x" --streams f16
expect 2 "belong to --device cuda" "$bin/lsa-dump" run --teacher $teacher --tokens "$work/long.jsonl" --out "$work/x" --streams bf16
hurt
sed -i 's/"format": *"lsa-shard\/1"/"format": "lsa-shard\/9"/' "$work/h/manifest.json"
expect 3 "lsa-shard/9" "$bin/lsa-dump" verify "$work/h"
expect 1 "manifest.json" "$bin/lsa-dump" verify "$work/none"

# a full disk (a file-size limit): exit 4, what was sealed stays, resume ends equal to an untouched run
(ulimit -f 300; exec "$bin/lsa-dump" run --teacher $teacher --tokens "$work/good.jsonl" --out "$work/full" --shard-bytes 400K >"$work/out" 2>&1)
rc=$?
[ $rc = 4 ] || { bad "disk full gave exit $rc"; cat "$work/out"; }
expect 0 "" "$bin/lsa-dump" resume "$work/full"
"${dump[@]}" --tokens "$work/good.jsonl" --out "$work/full2" --shard-bytes 400K >/dev/null 2>&1
diff <(cd "$work/full" && sha256sum *) <(cd "$work/full2" && sha256sum *) || bad "after the full disk the shards differ"

# SIGTERM: exit 5, and resume goes on to the same bytes
"$bin/lsa-dump" run --teacher $teacher --tokens recipes/mini/val.u16 --needs recipes/mini/val.jsonl --documents 0:2 --shard-bytes 1M \
    --out "$work/stop" >"$work/out" 2>&1 &
pid=$!
sleep 1
kill -TERM $pid
wait $pid
rc=$?
[ $rc = 5 ] || { bad "SIGTERM gave exit $rc"; cat "$work/out"; }
grep -q "lsa-dump resume" "$work/out" || bad "the stop message does not say how to go on"
expect 2 "resume" "$bin/lsa-dump" run --teacher $teacher --tokens recipes/mini/val.u16 --needs recipes/mini/val.jsonl --documents 0:2 --out "$work/stop"
expect 0 "" "$bin/lsa-dump" resume "$work/stop"
expect 0 "" "$bin/lsa-dump" verify "$work/stop"
verdict
