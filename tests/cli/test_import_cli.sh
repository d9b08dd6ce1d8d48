#!/usr/bin/env bash
# lsa-dump import from outside: one clear message for every kind of bad source, nothing of a pickle is run, and a refused import leaves nothing.
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/expect.sh
export OMP_NUM_THREADS=2
fm=tests/testkit/flashmemory_pickle.py
"$python" $fm "$work/good" 2 || bad "cannot make the documents"
model=(--teacher "$work/good/model" --out "$work/x")

expect 0 "Usage: lsa-dump import" "$bin/lsa-dump" import --help
expect 2 "--from, --teacher and --out" "$bin/lsa-dump" import --from "$work/good"
expect 1 "none" "$bin/lsa-dump" import --from "$work/none" "${model[@]}"
expect 2 "holds no doc_" "$bin/lsa-dump" import --from "$work" "${model[@]}"
expect 2 "neither a folder" "$bin/lsa-dump" import --from "$work/good/model/config.json" "${model[@]}"
expect 1 "config.json" "$bin/lsa-dump" import --from "$work/good" --teacher "$work/good" --out "$work/x"
expect 2 "--min-votes" "$bin/lsa-dump" import --from "$work/good" --min-votes 0 "${model[@]}"
expect 2 "--hidden-stride" "$bin/lsa-dump" import --from "$work/good" --hidden-stride 0 "${model[@]}"
expect 0 "imported 2 documents" "$bin/lsa-dump" import --from "$work/good" --teacher "$work/good/model" --out "$work/shards"
expect 2 "already holds" "$bin/lsa-dump" import --from "$work/good" --teacher "$work/good/model" --out "$work/shards"
expect 0 "nothing to resume" "$bin/lsa-dump" resume "$work/shards"
expect 0 "imported 1 documents" "$bin/lsa-dump" import --from "$work/good/doc_00001.pkl" --teacher "$work/good/model" --out "$work/one"

# the second of two documents is bad: the message names it, and not even a folder comes into being
refused() { # text command...: nothing is left, nothing was run
    expect 3 "$@"
    [ ! -e "$work/x" ] || { bad "a refused import left its folder: $1"; rm -rf "$work/x"; }
    [ ! -e "$work/ran" ] || { bad "a pickle was run: $1"; rm -f "$work/ran"; }
}
cat >"$work/cases" <<EOF
'label_pointers' is missing # del d["label_pointers"]
'compk_layer_2' is missing # del d["compk_layer_2"]
no 'hidden_layer_{L}' # [d.pop(k) for k in list(d) if k.startswith("hidden")]
CSA layer 2 has 102 index keys, expected 103 # d["compk_layer_2"] = d["compk_layer_2"][:-1]
CSA layer 0 has 104 index keys, expected 103 # d["compk_layer_0"] = np.concatenate([d["compk_layer_0"]] * 2)[:104]
'compk_layer_0' is 128 wide # d["compk_layer_0"] = np.ascontiguousarray(d["compk_layer_0"][:, :128])
index key 5 of CSA layer 0 is not a number # d["compk_layer_0"][5, 128:] = 0
index key 6 of CSA layer 2 is not a number # d["compk_layer_2"][6, 17] = 0xff
'hidden_layer_0' is 63 wide, expected 64 # d["hidden_layer_0"].bits = np.ascontiguousarray(d["hidden_layer_0"].bits[:, :63])
'hidden_layer_2' has 159 rows, expected 160 # d["hidden_layer_2"].bits = d["hidden_layer_2"].bits[:-1]
'hidden_layer_0' is U8 # d["hidden_layer_0"] = np.zeros((160, 64), np.uint8)
hidden vector of token 257 in CSA layer 2 is not finite # d["hidden_layer_2"].bits[3, 9] = 0x7fc0
hidden vector of token 254 in CSA layer 0 is not finite # d["hidden_layer_0"].bits[0, 0] = 0xff80
'positions_layer_2' row 1 # d["positions_layer_2"] = d["positions_layer_2"] + (np.arange(160) > 0)
'positions_layer_2' row 0 # d["positions_layer_2"] = d["positions_layer_2"] + 1
'positions_layer_0' row 0 is -9 # d["positions_layer_0"] = np.arange(160) - 9
'hidden_layer_3': the model has CSA layers 0 to 2; names hold the ordinal # d.update({k.replace("layer_2", "layer_3"): v for k, v in d.items()})
'hidden_layer_9': the model has CSA layers 0 to 2 # d.update({k.replace("layer_2", "layer_9"): v for k, v in d.items()})
layer map differs: CSA layer 2 # [d.pop(k) for k in list(d) if "layer_2" in k]
layer map differs: CSA layer 1 # d.update({k.replace("layer_2", "layer_1"): v for k, v in d.items()})
chunk 103, the document has [0, 103) # d["label_indices"][-1] = 103
chunk -1, the document has [0, 103) # d["label_indices"][0] = -1
token 254 is labelled with chunk 63, which is not complete yet: only 63 are visible # d["label_indices"][0] = 63
twice # d["label_indices"][1] = d["label_indices"][0]
has 4 votes, must be in [3, 3] # d["label_scores"][7] = 4
has 2 votes, must be in [3, 3] # d["label_scores"][7] = 2
'label_scores' has # d["label_scores"] = d["label_scores"][:-1]
'label_pointers' says # d["label_pointers"][5] = -1
'label_pointers' says # d["label_pointers"][5] = 1 << 30
'label_pointers' says # d["label_pointers"][-1] -= 1
'label_pointers' says # d["label_pointers"][0] = 1
'label_pointers' has 160 rows, expected 161 # d["label_pointers"] = d["label_pointers"][1:]
'label_indices' is I64 # d["label_indices"] = d["label_indices"].astype("<i8")
posix.system # d["x"] = evil
posix.system # options["inner"] = evil
builtins.eval # d["x"] = type("T", (), {"__reduce__": lambda s: (eval, ("1",))})()
_codecs.encode # options["protocol"] = 2
bytes without a storage # options["inner"] = 7
bytes that do not hold exactly one storage # options["keys"] = 2
EOF
evil='evil = type("T", (), {"__reduce__": lambda s: (os.system, ("touch '$work/ran'",))})(); '
sed "s|.* # |$evil|" "$work/cases" | "$python" $fm "$work/bad" - || bad "cannot make the bad documents"
number=0
while IFS= read -r case; do
    refused "${case%% # *}" "$bin/lsa-dump" import --from "$work/bad/$number" "${model[@]}"
    grep -q "$number/doc_00001.pkl" "$work/out" || { bad "the message does not name the file: $case"; cat "$work/out"; }
    number=$((number + 1))
done <"$work/cases"

# cut anywhere
size=$(stat -c %s "$work/good/doc_00001.pkl")
for at in 0 1 2 11 40 300 $((size / 3)) $((size / 2)) $((size - 100)) $((size - 1)); do
    rm -rf "$work/bad"
    cp -r "$work/good" "$work/bad"
    truncate -s "$at" "$work/bad/doc_00001.pkl"
    refused "doc_00001.pkl" "$bin/lsa-dump" import --from "$work/bad" "${model[@]}"
done
expect 3 "truncated" "$bin/lsa-dump" import --from "$work/bad" "${model[@]}"
printf 'hello\n' >"$work/bad/doc_00001.pkl"
expect 3 "doc_00001.pkl" "$bin/lsa-dump" import --from "$work/bad" "${model[@]}"
expect 0 "1 documents left out" "$bin/lsa-dump" import --from "$work/bad" --skip-bad "${model[@]}"
grep -q "left out: .*doc_00001.pkl" "$work/out" || bad "--skip-bad does not name what it leaves out"
expect 0 "ok: 1 shards, 1 documents" "$bin/lsa-dump" verify "$work/x"
rm -rf "$work/x"
expect 3 "none of the 1 documents passed" "$bin/lsa-dump" import --from "$work/bad/doc_00001.pkl" --skip-bad "${model[@]}"

# engine responses: a good line, then one that is not
cat >"$work/cases" <<'EOF'
imported 2 documents, 48 labelled tokens # pass
JSON # o = "{"
format is 'lsa-import/2' # o["format"] = "lsa-import/2"
unknown key 'layer' # o["layer"] = []
key 'name' is missing # del o["name"]
must have 1 to 95 bytes # o["name"] = "n" * 96
'first' is -1 # o["first"] = -1
'tensors' must name # o["tensors"] = []
'tensors' must name # o["tensors"] = ["0.safetensors"] * 5
gone.safetensors # o["tensors"] = "gone.safetensors"
is in two of its files # u["hidden_states"] = t["hidden_states"]
different 'token_ids' # u["token_ids"] = t["token_ids"][::-1].copy()
'token_ids' has 23 entries, expected 24 # t["token_ids"] = t["token_ids"][1:]
CSA ordinal 2 is layer 5 of the model, not 4 # o["layers"][1]["id"] = 4
CSA ordinal 3, the model has [0, 3) # o["layers"][1]["ordinal"] = 3
CSA ordinal 0 is there twice # o["layers"][1] = o["layers"][0]
key 'hidden' is missing # del o["hidden"]
'hidden' is 'residual' # o["hidden"] = "residual"
those of the documents before 'attn_norm' # o["hidden"] = "final"
belong together # del o["layers"]
belong together # del t["hidden_states"]
expected BF16, F16 or F32 [tokens, 2, 64] # t["hidden_states"] = t["hidden_states"][:, :, :60]
expected BF16, F16 or F32 [tokens, 2, 64] # t["hidden_states"] = t["hidden_states"][:, :1]
'hidden_states' covers 20 tokens, expected 24 # t["hidden_states"] = t["hidden_states"][:20]
hidden vector of token 3 in CSA layer 2 is not finite # t["hidden_states"][3, 1, 5] = np.nan
hidden vector of token 4 in CSA layer 0 is not finite # t["hidden_states"][4, 0, 5] = 3.4e38
layer map differs # del t["index_keys.2"]
CSA layer 2 has 7 index keys, expected 6 # t["index_keys.2"] = np.concatenate([t["index_keys.2"], t["index_keys.2"][:1]])
'index_keys.0' must be U8 [chunks, 132] # t["index_keys.0"] = t["index_keys.0"][:, :131]
expected [tokens, 3, k] # t["indexer_topk"] = t["indexer_topk"][:, :2]
'indexer_topk' is F32 # t["indexer_topk"] = t["indexer_topk"].astype(np.float32)
token 8 is labelled with chunk 2, which is not complete yet # t["indexer_topk"][8, 1, 1] = 2
chunk 6, the document has [0, 6) # t["indexer_topk"][23, 1, 1] = 6
CSA layer 2 selects chunk 1 twice # t["indexer_topk"][20, 2, 1] = 1
another rule # t["indexer_topk"] = t["indexer_topk"][:, :, :1]
another rule # t.pop("indexer_topk"); t.update(label_begin=np.zeros(25, np.int64), label_chunk=np.zeros(0, np.int32), label_votes=np.zeros(0, np.uint8))
neither 'indexer_topk' nor 'label_begin' # del t["indexer_topk"]
'label_chunk' has 2 entries, 'label_votes' 1 # t.pop("indexer_topk"); t.update(label_begin=np.zeros(25, np.int64), label_chunk=np.zeros(2, np.int32), label_votes=np.zeros(1, np.uint8))
EOF
sed 's|.* # ||' "$work/cases" | "$python" /dev/fd/3 "$work/resp" 3<<'PY' || bad "cannot make the responses"
import json, os, sys
import numpy as np
from safetensors.numpy import save_file
for number, statement in enumerate(sys.stdin):
    d = f"{sys.argv[1]}/{number}"
    os.makedirs(d)
    with open(d + "/r.jsonl", "w") as f:
        for i in range(2):
            topk = np.full((24, 3, 2), -1, np.int32)
            topk[8:, :, 0], topk[12:, :, 1] = 1, 2
            t = {"indexer_topk": topk, "hidden_states": np.ones((24, 2, 64), np.float32), "token_ids": np.arange(24)}
            for k in (0, 2):
                t[f"index_keys.{k}"] = np.ones((6, 132), np.uint8)
                t[f"index_keys.{k}"][:, 128:] = np.full((6, 1), 0.5, np.float32).view(np.uint8)
            u = {"unused": np.zeros(1, np.float32)}
            o = {"format": "lsa-import/1", "name": f"r{i}", "tensors": [f"{i}.safetensors", f"{i}u.safetensors"],
                 "layers": [{"ordinal": 0, "id": 1}, {"ordinal": 2, "id": 5}], "hidden": "attn_norm"}
            if i:
                exec(statement)
            save_file({k: np.ascontiguousarray(v) for k, v in t.items()}, f"{d}/{i}.safetensors")
            save_file(u, f"{d}/{i}u.safetensors")
            print(json.dumps(o) if isinstance(o, dict) else o, file=f)
PY
number=0
while IFS= read -r case; do
    text=${case%% # *}
    import=("$bin/lsa-dump" import --from "$work/resp/$number/r.jsonl" "${model[@]}")
    case $number,$text in
    0,*)
        expect 0 "$text" "${import[@]}"
        expect 0 "ok: 1 shards, 2 documents, 48 tokens" "$bin/lsa-dump" verify "$work/x"
        rm -rf "$work/x" ;;
    *,gone*) expect 1 "$text" "${import[@]}" ;;
    *) refused "$text" "${import[@]}" ;;
    esac
    [ $number = 0 ] || grep -q "$number/r.jsonl:2" "$work/out" || { bad "the message does not name the line: $case"; cat "$work/out"; }
    number=$((number + 1))
done <"$work/cases"
: >"$work/empty.jsonl"
expect 3 "no documents" "$bin/lsa-dump" import --from "$work/empty.jsonl" "${model[@]}"

# a full disk (a file-size limit) and SIGTERM: what was sealed stays, resume ends equal to an untouched import
mkdir "$work/many"
for i in $(seq 100 129); do ln -s "$work/good/doc_00000.pkl" "$work/many/doc_$i.pkl"; done
import=("$bin/lsa-dump" import --from "$work/many" --teacher "$work/good/model")
(ulimit -f 300; exec "${import[@]}" --out "$work/full" >"$work/out" 2>&1)
rc=$?
[ $rc = 4 ] || { bad "disk full gave exit $rc"; cat "$work/out"; }
expect 0 "" "$bin/lsa-dump" resume "$work/full"
expect 0 "30 documents" "$bin/lsa-dump" verify "$work/full"
expect 0 "" "${import[@]}" --shard-bytes 1K --out "$work/all"
"${import[@]}" --shard-bytes 1K --out "$work/stop" >"$work/out" 2>&1 &
pid=$!
for _ in $(seq 500); do [ -e "$work/stop/shard_00001.h5" ] && break; sleep 0.01; done
kill -TERM $pid
wait $pid
rc=$?
[ $rc = 5 ] || { bad "SIGTERM gave exit $rc"; cat "$work/out"; }
grep -q "lsa-dump resume" "$work/out" || bad "the stop message does not say how to go on"
expect 2 "resume" "${import[@]}" --shard-bytes 1K --out "$work/stop"
expect 0 "" "$bin/lsa-dump" resume "$work/stop"
diff <(cd "$work/all" && sha256sum *) <(cd "$work/stop" && sha256sum *) || bad "after SIGTERM the shards differ"
verdict
