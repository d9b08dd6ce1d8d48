"""DeepSeek-V4 checkpoints as the hub stores them, and their dequantised twins.

Written from the architecture notes (2.1 codes, 11.2 tensors, 12.1 names): FP8 E4M3 matrices with one E8M0 scale per 128 x 128 block, routed experts
as packed FP4 E2M1 with one E8M0 scale per row and 32 columns, norms BF16, the rest F32. Numpy only; shares nothing with the C loader."""
import json
import math
import os
import re
import struct

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
E4M3 = np.array([(m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)) for e in range(16) for m in range(8)][:127], np.float64)  # 127 is NaN

H_NAMES = {  # transformers' spelling of what save_pretrained renames, at the end of a name
    "attn.norm.weight": "attn.kv_norm.weight", "model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight",
    "model.hc_head.hc_fn": "hc_head_fn", "model.hc_head.hc_base": "hc_head_base", "model.hc_head.hc_scale": "hc_head_scale",
}


def read(folder):
    """{original name: float32 or int64 array} of a BF16, F32 or I64 model folder."""
    out = {}
    for file in sorted(set(json.load(open(f"{folder}/model.safetensors.index.json"))["weight_map"].values())):
        raw = open(f"{folder}/{file}", "rb").read()
        n = struct.unpack("<Q", raw[:8])[0]
        for name, e in json.loads(raw[8 : 8 + n]).items():
            if name == "__metadata__":
                continue
            data = raw[8 + n + e["data_offsets"][0] : 8 + n + e["data_offsets"][1]]
            if e["dtype"] == "BF16":
                x = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                x = np.frombuffer(data, {"F32": "<f4", "I64": "<i8"}[e["dtype"]])
            name = next((new if old.startswith("model.") else name.replace(old, new) for old, new in H_NAMES.items() if name.endswith(old)), name)
            out[re.sub(r"^model\.", "", name)] = x.reshape(e["shape"]).copy()
    return out


def storage(name):
    """Section 11.2."""
    if name.endswith("tid2eid"):
        return "I64"
    if ".ffn.experts." in name:
        return "FP4"
    if re.search(r"\.(wq_a|wq_b|wkv|wo_a|wo_b|w1|w2|w3)\.weight$", name) and "compressor" not in name:
        return "FP8"
    if re.search(r"hc_|\.ape$|attn_sink|gate\.bias", name):
        return "F32"
    return "BF16"


def bf16(x):
    """Nearest, ties to even, as float32."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + (u >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).reshape(np.shape(x))


def nearest(values, x):
    """Index of the nearest of the ascending values, ties to the even index."""
    hi = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    d = (x - values[hi - 1]) - (values[hi] - x)
    return np.where(d > 0, hi, np.where(d < 0, hi - 1, np.where(hi % 2 == 0, hi, hi - 1)))


def scale_byte(amax, largest):
    """E8M0: the smallest power of two with amax / scale <= largest."""
    return 127 if amax == 0 else min(max(math.ceil(math.log2(amax / largest)), -127), 127) + 127


def quantise(x, bits, rows, cols):
    """Codes (one a byte), scale bytes, and the values they mean, for blocks of rows x cols."""
    table, largest = (E4M3, 448.0) if bits == 8 else (E2M1, 6.0)
    code, value = np.empty(x.shape, np.uint8), np.empty(x.shape, np.float64)
    scale = np.empty((-(-x.shape[0] // rows), -(-x.shape[1] // cols)), np.uint8)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = np.s_[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
            b = x[at].astype(np.float64)
            scale[i, j] = scale_byte(float(np.abs(b).max()), largest)
            s = 2.0 ** (int(scale[i, j]) - 127)
            k = nearest(table, np.minimum(np.abs(b) / s, largest))
            code[at] = k | (np.signbit(b).astype(np.uint8) << (bits - 1))
            value[at] = np.where(np.signbit(b), -table[k], table[k]) * s
    exact = value.astype(np.float32)
    assert np.array_equal(exact.astype(np.float64), value) and np.array_equal(bf16(exact), exact), "every product is a bf16 number"
    return code, scale, exact


def save(folder, config, tensors, n_files=3, prefix=""):
    """tensors: {name: (dtype label, shape, bytes)}."""
    os.makedirs(folder)
    names, index = sorted(tensors), {}
    for i in range(n_files):
        file, header, data = f"model-{i + 1:05d}-of-{n_files:05d}.safetensors", {}, b""
        for name in names[i::n_files]:
            dtype, shape, b = tensors[name]
            header[prefix + name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(b)]}
            index[prefix + name] = file
            data += b
        text = json.dumps(header).encode()
        open(f"{folder}/{file}", "wb").write(struct.pack("<Q", len(text)) + text + data)
    json.dump({"metadata": {}, "weight_map": index}, open(f"{folder}/model.safetensors.index.json", "w"))
    json.dump(config, open(f"{folder}/config.json", "w"))


def plain(x):
    """The narrowest of BF16 and F32 that holds it."""
    if x.dtype == np.int64:
        return "I64", x.shape, x.tobytes()
    if np.array_equal(bf16(x), x):
        return "BF16", x.shape, (x.view(np.uint32) >> 16).astype("<u2").tobytes()
    return "F32", x.shape, x.astype("<f4").tobytes()


def convert(weights, hub=True):
    """(stored, twin): tensors for save, as the hub stores them and with the values they mean. hub=False: the other accepted labels."""
    stored, twin = {}, {}
    for name, x in weights.items():
        kind = storage(name)
        if kind in ("FP8", "FP4"):
            code, scale, x = quantise(x, 8, 128, 128) if kind == "FP8" else quantise(x, 4, 1, 32)
            stored[name.replace(".weight", ".scale" if hub else ".weight_scale_inv")] = ("F8_E8M0", scale.shape, scale.tobytes())
            if kind == "FP8":
                stored[name] = ("F8_E4M3", code.shape, code.tobytes())
            else:
                packed = code[:, 0::2] | code[:, 1::2] << 4
                stored[name] = ("I8", packed.shape, packed.tobytes()) if hub else ("F4", code.shape, packed.tobytes())
            twin[name] = plain(x)
        elif kind == "I64":
            stored[name] = twin[name] = plain(x)
        else:
            x = bf16(x) if kind == "BF16" else x
            stored[name] = ("BF16", x.shape, (x.view(np.uint32) >> 16).astype("<u2").tobytes()) if kind == "BF16" else ("F32", x.shape, x.astype("<f4").tobytes())
            twin[name] = plain(x)
    return stored, twin


def random_weights(c, seed):
    """Every tensor of config c (hub spelling), names and shapes of section 11, drawn so that activations stay near 1."""
    g, w = np.random.default_rng(seed), {}
    d, n, H, D, r = c["hidden_size"], c["hc_mult"], c["num_attention_heads"], c["head_dim"], c["q_lora_rank"]
    G, m, E = c["o_groups"] * c["o_lora_rank"], c["moe_intermediate_size"], c["n_routed_experts"]

    def put(name, *shape, gain=2.0, mean=0.0):
        x = g.standard_normal(shape) * (gain / math.sqrt(shape[-1]) if len(shape) > 1 else gain) + mean
        w[name] = x.astype(np.float32)

    def compressor(p, ratio, width):
        k = (2 if ratio == 4 else 1) * width
        put(f"{p}.wkv.weight", k, d), put(f"{p}.wgate.weight", k, d), put(f"{p}.ape", ratio, k), put(f"{p}.norm.weight", width, gain=0.2, mean=1)

    put("embed.weight", c["vocab_size"], d, gain=math.sqrt(d)), put("head.weight", c["vocab_size"], d), put("norm.weight", d, gain=0.2, mean=1)
    put("hc_head_fn", n, n * d), put("hc_head_base", n, gain=0.5), put("hc_head_scale", 1, gain=0.2, mean=1)
    for l in range(c["num_hidden_layers"]):
        p, ratio = f"layers.{l}", c["compress_ratios"][l]
        for part in ("attn", "ffn"):
            put(f"{p}.{part}_norm.weight", d, gain=0.2, mean=1), put(f"{p}.hc_{part}_fn", n * (n + 2), n * d)
            put(f"{p}.hc_{part}_base", n * (n + 2), gain=0.5), put(f"{p}.hc_{part}_scale", 3, gain=0.2, mean=1)
        put(f"{p}.attn.wq_a.weight", r, d), put(f"{p}.attn.q_norm.weight", r, gain=0.2, mean=1), put(f"{p}.attn.wq_b.weight", H * D, r)
        put(f"{p}.attn.wkv.weight", D, d), put(f"{p}.attn.kv_norm.weight", D, gain=0.2, mean=1), put(f"{p}.attn.attn_sink", H)
        put(f"{p}.attn.wo_a.weight", G, H * D // c["o_groups"]), put(f"{p}.attn.wo_b.weight", d, G)
        if ratio:
            compressor(f"{p}.attn.compressor", ratio, D)
        if ratio == 4:
            put(f"{p}.attn.indexer.wq_b.weight", c["index_n_heads"] * c["index_head_dim"], r), put(f"{p}.attn.indexer.weights_proj.weight", c["index_n_heads"], d)
            compressor(f"{p}.attn.indexer.compressor", ratio, c["index_head_dim"])
        put(f"{p}.ffn.gate.weight", E, d)
        if l < c["num_hash_layers"]:
            w[f"{p}.ffn.gate.tid2eid"] = np.stack([g.permutation(E)[: c["num_experts_per_tok"]] for _ in range(c["vocab_size"])]).astype(np.int64)
        else:
            put(f"{p}.ffn.gate.bias", E, gain=0.3)
        for who in [f"experts.{e}" for e in range(E)] + ["shared_experts"]:
            put(f"{p}.ffn.{who}.w1.weight", m, d), put(f"{p}.ffn.{who}.w3.weight", m, d), put(f"{p}.ffn.{who}.w2.weight", d, m)
    return w
