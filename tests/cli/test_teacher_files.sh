#!/usr/bin/env bash
# Model folders that are not whole, not sound, or not DeepSeek-V4: one clear message each, and no shard folder is left.
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/expect.sh
export OMP_NUM_THREADS=2
printf '{"tokens": [%s]}\n' "$(seq -s, 5 84)" >"$work/docs.jsonl"

# change STATEMENT: a fresh copy of the mini teacher with the Python statement applied. In its hands: t = {name: [dtype, shape, bytes, file]},
# c = config.json, first(suffix) = the first such name, put(name, like) = a copy of a tensor, at(dtype) = where to write a number.
change() {
    rm -rf "$work/t"
    "$python" - recipes/mini/teacher "$work/t" "$1" <<'PY' || bad "cannot make: $1"
import json, os, struct, sys
src, dst, statement = sys.argv[1:]
os.makedirs(dst)
c = json.load(open(f"{src}/config.json"))
index = json.load(open(f"{src}/model.safetensors.index.json"))["weight_map"]
t = {}
for file in sorted(set(index.values())):
    raw = open(f"{src}/{file}", "rb").read()
    n = struct.unpack("<Q", raw[:8])[0]
    for name, e in json.loads(raw[8 : 8 + n]).items():
        if name != "__metadata__":
            a, b = e["data_offsets"]
            t[name] = [e["dtype"], e["shape"], bytearray(raw[8 + n + a : 8 + n + b]), file]
def first(suffix):
    return next(k for k in sorted(t) if k.endswith(suffix))
def put(name, like):
    t[name] = [x if not isinstance(x, bytearray) else bytearray(x) for x in t[like]]
def bf16(name, element, bits):
    assert t[name][0] == "BF16"
    t[name][2][2 * element : 2 * element + 2] = struct.pack("<H", bits)
exec(statement)
for file in sorted({e[3] for e in t.values()}):
    header, data = {}, b""
    for name in sorted(t):
        if t[name][3] == file:
            header[name] = {"dtype": t[name][0], "shape": t[name][1], "data_offsets": [len(data), len(data) + len(t[name][2])]}
            data += t[name][2]
    text = json.dumps(header).encode()
    open(f"{dst}/{file}", "wb").write(struct.pack("<Q", len(text)) + text + data)
json.dump({"weight_map": {name: e[3] for name, e in t.items()}}, open(f"{dst}/model.safetensors.index.json", "w"))
json.dump(c, open(f"{dst}/config.json", "w"))
PY
}
run() { # code text
    rm -rf "$work/x"
    expect "$1" "$2" "$bin/lsa-dump" run --teacher "$work/t" --tokens "$work/docs.jsonl" --out "$work/x"
    if [ "$1" = 0 ]; then "$bin/lsa-dump" verify "$work/x" >/dev/null || bad "the shards do not verify"; else [ ! -e "$work/x" ] || bad "a refused teacher left a shard folder"; fi
}
silent() { if grep -q "nothing uses" "$work/out"; then bad "a warning about tensors that are expected: $1"; cat "$work/out"; fi; }
last_file() { ls "$work"/t/model-*.safetensors | tail -1; }

# tensors that nobody needs: the drafting block is expected, anything else is named once
change 'pass'
run 0 "sealed"
silent "the teacher itself"
change 'k = first("wq_a.weight"); [put(n, k) for n in ("mtp.0.attn.wq_a.weight", "mtp.2.ffn.experts.1.w1.weight", "model.mtp.0.e_proj.weight", "mtp.0.emb.tok_emb.weight")]'
run 0 "sealed"
silent "MTP and DSpark"
change 'k = first("wq_a.weight"); [put(n, k) for n in ("layers.1.attn.extra_gate.weight", "model.layers.9.attn.wq_a.weight", "zzz", "yyy", "model.vision.proj")]'
run 0 "hold 5 tensors that nothing uses"
expect 0 "5 tensors that nothing uses: 'layers.1.attn.extra_gate.weight', 'model.layers.9.attn.wq_a.weight', 'model.vision.proj' ..." \
    "$bin/lsa-decode" validate --teacher "$work/t" --tokens "$work/docs.jsonl" --policy full --report "$work/report"
[ "$(grep -c 'nothing uses' "$work/out")" = 1 ] || bad "the warning is not printed once"

# not whole
change 'del t[first("layers.3.attn.wo_b.weight")]'
run 3 "'layers.3.attn.wo_b.weight' is missing"
change '[t.pop(k) for k in list(t) if ".layers.4.ffn.experts.2." in k]'
run 3 "3 of the"
grep -q "first 'layers.4.ffn.experts.2.w1.weight'" "$work/out" || bad "the first missing tensor is not named"
change 'c["n_routed_experts"] = 6'
run 3 "ffn.gate.weight"
change 't[first("layers.2.attn.compressor.ape")][1] = [64, 256]'
run 3 "layers.2.attn.compressor.ape"
change 'pass'
truncate -s -5000 "$(last_file)"
run 3 "$(basename "$(last_file)")"
truncate -s 100 "$(last_file)"
run 3 "$(basename "$(last_file)")"
truncate -s 3 "$(last_file)"
run 3 "$(basename "$(last_file)")"
change 'pass'
rm "$(last_file)"
run 3 "1 of 2 weight files that model.safetensors.index.json names are missing, first 'model-00002-of-00002.safetensors'"
rm "$work"/t/model-*.safetensors
run 3 "2 of 2 weight files"
rm "$work"/t/model.safetensors.index.json
run 1 "holds no weights"

# not sound: NaN, infinity, numbers that overflow on the way
change 'bf16(first("layers.5.ffn.experts.3.w2.weight"), 300, 0x7FC0)'
run 3 "layers.5.ffn.experts.3.w2.weight' of model 't': element [2,44] is not a finite number"
change 'bf16(first("layers.0.ffn_norm.weight"), 7, 0xFF80)'
run 3 "element [0,7] is not a finite number"
change '[bf16(first("layers.3.attn.compressor.wkv.weight"), i, 0x7F00) for i in range(65536)]'
rm -rf "$work/x"
expect 6 "not finite" "$bin/lsa-dump" run --teacher "$work/t" --tokens "$work/docs.jsonl" --out "$work/x"
expect 0 '"shards": 0' "$bin/lsa-dump" info --json "$work/x"

# not DeepSeek-V4
for mark in 'c["architectures"] = ["DeepseekV41ForCausalLM"]' 'c["model_type"] = "deepseek_v41"' 'c = {"text_config": c}' \
    'c["kv_source_layer_ids"] = [2, 8, 14, 20]' 'c["index_source_layer_ids"] = [2, 8]'; do
    change "$mark"
    run 1 "this is a DeepSeek-V4.1 model; only V4"
done
change 'c.pop("layer_types"); c.pop("compress_rates"); c["compress_ratios"] = [0, 2, 2, 2, 1, 1, 1]'
run 1 "DeepSeek-V4.1"
verdict
