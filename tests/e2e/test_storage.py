#!/usr/bin/env python3
"""Teachers stored as the hub stores DeepSeek-V4 (FP8 with E8M0 block scales, packed FP4 experts) give, bit for bit, what their dequantised twins in
BF16 and F32 give: every dataset of a dump, f32 probes included, and every loss of the decoder. One wrong nibble, code or scale is seen."""
import array
import json
import os
import shutil
import subprocess
import sys
import tempfile

import h5py
import numpy as np

sys.path.insert(0, "tests/testkit")
import store_v4 as v4  # noqa: E402

BIN = os.environ["LSA_BIN"]
os.environ["OMP_NUM_THREADS"] = "2"
work = tempfile.mkdtemp(prefix="lsa-storage-")

# Architecture notes 19.1 with widths for 128 x 128 blocks; 192 and 160 leave blocks that are not full.
RANDOM = dict(
    architectures=["DeepseekV4ForCausalLM"], vocab_size=256, hidden_size=256, num_hidden_layers=5, num_hash_layers=1, num_attention_heads=4, head_dim=128, qk_rope_head_dim=64,
    q_lora_rank=192, o_groups=2, o_lora_rank=96, sliding_window=8, compress_ratios=[0, 4, 16, 4, 16, 0], compress_rope_theta=160000, rope_theta=10000,
    rope_scaling=dict(type="yarn", factor=16, beta_fast=32, beta_slow=1, original_max_position_embeddings=64), index_n_heads=16, index_head_dim=128, index_topk=12,
    hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=160,
    routed_scaling_factor=1.5, swiglu_limit=1.0, quantization_config=dict(quant_method="fp8", fmt="e4m3", scale_fmt="ue8m0", weight_block_size=[128, 128]), expert_dtype="fp4",
)


def lsa(program, *args, code=0):
    p = subprocess.run([f"{BIN}/{program}", *args], capture_output=True, text=True)
    assert p.returncode == code, (program, args, p.returncode, p.stderr)
    return p.stdout, p.stderr


def forward(teacher, tokens):
    """Every number that a dump and a validation of this teacher give."""
    shutil.rmtree(f"{work}/s", ignore_errors=True)
    err = lsa("lsa-dump", "run", "--teacher", teacher, "--tokens", tokens, "--hidden-stride", "1", "--dense-every", "8", "--out", f"{work}/s")[1]
    assert "nothing uses" not in err, err
    lsa("lsa-dump", "verify", f"{work}/s")
    out = {}
    with h5py.File(f"{work}/s/shard_00000.h5") as f:
        f.visititems(lambda n, x: out.update({n: x[()].tobytes()}) if isinstance(x, h5py.Dataset) else None)
        assert len(f["probe/c0/logit"]) > 20 and f["probe/c0/q"].dtype == np.float32
        assert len(np.unique(f["hidden/c1"][:])) > 1000
    out["losses"] = lsa("lsa-decode", "validate", "--teacher", teacher, "--tokens", tokens, "--policy", "full,dense", "--json", "--report", f"{work}/r")[0]
    assert '"nll"' in out["losses"] and "nan" not in out["losses"].lower()
    return out


def differences(a, b):
    assert a.keys() == b.keys()
    return sorted(k for k in a if a[k] != b[k])


def refused(stored, config, text):
    shutil.rmtree(f"{work}/bad", ignore_errors=True)
    v4.save(f"{work}/bad", config, stored)
    err = lsa("lsa-dump", "run", "--teacher", f"{work}/bad", "--tokens", f"{work}/random.jsonl", "--out", f"{work}/none", code=3)[1]
    assert text in err and err.count("error:") == 1 and not os.path.exists(f"{work}/none"), err


def pair(what, config, weights, tokens, **labels):
    stored, twin = v4.convert(weights, **labels)
    v4.save(f"{work}/{what}", config, stored, prefix="" if labels.get("hub", True) else "model.")
    v4.save(f"{work}/{what}-twin", {k: v for k, v in config.items() if k not in ("quantization_config", "expert_dtype")}, twin)
    a, b = forward(f"{work}/{what}", tokens), forward(f"{work}/{what}-twin", tokens)
    assert not differences(a, b), (what, differences(a, b))
    plan = json.loads(lsa("lsa-dump", "plan", "--json", "--teacher", f"{work}/{what}", "--tokens", tokens)[0])
    declared, written = plan["weight_bytes"], sum(len(x[2]) for x in stored.values())
    print(f"{what}: {len(stored)} tensors of {written} bytes, twin of {sum(len(x[2]) for x in twin.values())}: {len(a)} results equal")
    if labels.get("hub", True) and "num_hash_layers" in config:
        assert declared == written, (declared, written)
    return stored, a


def tokens_file(name, ids):
    with open(f"{work}/{name}", "w") as f:
        print(json.dumps({"tokens": [int(i) for i in ids]}), file=f)
    return f"{work}/{name}"


try:
    rng = np.random.default_rng(3)
    tokens = tokens_file("random.jsonl", rng.integers(0, 256, 150))
    weights = v4.random_weights(RANDOM, 11)
    # scales far apart inside a tensor, an all-zero block, and blocks whose largest value sits on the edge of a code
    weights["layers.2.ffn.experts.3.w1.weight"][:7] *= 2.0**-30
    weights["layers.1.attn.wq_a.weight"][128:, :128] = 0
    weights["layers.3.attn.wo_b.weight"][128:, 128:] *= 2.0**12
    weights["layers.1.ffn.experts.0.w2.weight"][5, 32:64] = 0
    stored, base = pair("random", RANDOM, weights, tokens)
    codes = np.concatenate([np.frombuffer(x[2], np.uint8) for x in stored.values() if x[0] == "F8_E4M3"])
    nibbles = np.concatenate([np.frombuffer(x[2], np.uint8) for x in stored.values() if x[0] == "I8"])
    assert len(np.unique(codes)) >= 250 and len(np.unique(nibbles)) == 256, "every code occurs but NaN and perhaps the rarest"
    pair("labels", RANDOM, weights, tokens, hub=False)

    ids = array.array("H", open("recipes/mini/train.u16", "rb").read(2 * 400)).tolist()
    pair("mini", json.load(open("recipes/mini/teacher/config.json")), v4.read("recipes/mini/teacher"), tokens_file("mini.jsonl", ids))

    # one wrong byte is seen
    def changed(name, at, xor):
        x = bytearray(stored[name][2])
        x[at] ^= xor
        return {**stored, name: (*stored[name][:2], bytes(x))}

    used = "layers.1.ffn.shared_experts.w1"
    for name, at, xor in ((f"{used}.weight", 1000, 0x10), (f"{used}.scale", 1, 1), ("layers.2.attn.wkv.weight", 5, 0x80), ("layers.1.attn.indexer.wq_b.scale", 3, 2)):
        shutil.rmtree(f"{work}/wrong", ignore_errors=True)
        v4.save(f"{work}/wrong", RANDOM, changed(name, at, xor))
        seen = differences(forward(f"{work}/wrong", tokens), base)
        assert "hidden/c1" in seen or "probe/c0/q" in seen, name
    swapped = dict(stored)
    for name, (dtype, shape, b) in stored.items():
        if dtype == "I8":
            x = np.frombuffer(b, np.uint8)
            swapped[name] = (dtype, shape, (x >> 4 | x << 4).astype(np.uint8).tobytes())
    shutil.rmtree(f"{work}/wrong", ignore_errors=True)
    v4.save(f"{work}/wrong", RANDOM, swapped)
    assert "hidden/c1" in differences(forward(f"{work}/wrong", tokens), base), "nibbles in the other order"

    # NaN scales and codes, scales that are missing or of another shape
    refused(changed("layers.2.ffn.experts.5.w2.scale", 7, 0xFF ^ stored["layers.2.ffn.experts.5.w2.scale"][2][7]), RANDOM, "layers.2.ffn.experts.5.w2.weight' of model 'bad': element [1,64] is not a finite number")
    refused(changed("layers.4.attn.wo_a.weight", 300, 0x7F ^ stored["layers.4.attn.wo_a.weight"][2][300]), RANDOM, "layers.4.attn.wo_a.weight' of model 'bad': element [1,44] is not a finite number")
    refused({k: x for k, x in stored.items() if k != "layers.0.attn.wkv.scale"}, RANDOM, "'layers.0.attn.wkv.weight' is quantised but its scale")
    refused({k: x for k, x in stored.items() if k != "layers.0.ffn.experts.1.w3.scale"}, RANDOM, "'layers.0.ffn.experts.1.w3.weight' is quantised but its scale")
    name = "layers.0.attn.wq_b.scale"
    refused({**stored, name: (stored[name][0], stored[name][1][::-1], stored[name][2])}, RANDOM, "scale of 'layers.0.attn.wq_b.weight' must be [4,2]")
    print("ok")
finally:
    shutil.rmtree(work, ignore_errors=True)
