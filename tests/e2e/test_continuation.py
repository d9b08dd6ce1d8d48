#!/usr/bin/env python3
"""A continuation through the chain, judged by numpy alone: what training saves, resumes and exports, what the golden vectors, `liblsa_indexer` and `lsa-decode` make of
it, and that no program leaves it out unseen."""
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

sys.path[:0] = ["export/abi", "tests/testkit"]
import retrieve_topk as r
from small_run import BIN, STEP as step, resumes_alike, run, same, train

BUILD = os.environ["LSA_BUILD"]
os.environ["OMP_NUM_THREADS"] = "2"
REACH = 5
work = tempfile.mkdtemp(prefix="lsa-continuation-")


def load(path):
    with safe_open(path, "numpy") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def continued(z, b):
    """The definition: every chunk looks at itself and at those before it."""
    return np.array([max(z[c - j] - (np.float32(b[j - 1]) if j else np.float32(0)) for j in range(min(len(b), c) + 1)) for c in range(len(z))], np.float32)


def training():
    run("lsa-dump", "synth", "--out", f"{work}/shards", "--docs", "8", "--tokens", "1024", "--layers", "3", "--hidden", "32")
    train(work, f"{work}/run", f"model.continuation={REACH}")
    tensors, meta = load(f"{work}/run/{step}/model.safetensors")
    moments, _ = load(f"{work}/run/{step}/optim.safetensors")
    b = tensors["continuation"]
    assert b.shape == (REACH,) and (b >= 0).all() and json.loads(meta["lsa.geometry"])["continuation"] == REACH
    assert (moments["v.continuation"] > 0).any(), "no cost has moved: the test sees nothing"
    resumes_alike(work)
    e = json.loads(run("lsa-train", "eval", f"{work}/run/ckpt/latest", "--data", f"{work}/shards", "--held-out", "--device", "cpu", "--json"))
    rows = e if "plain" in e else e["eval"]
    assert rows["plain"] != rows["sum"]
    train(work, f"{work}/none", f"model.continuation={REACH}", "sample.candidates=sampled", code=2, say="sample.candidates: all")
    train(work, f"{work}/none", "model.continuation=4", more=("--init", f"{work}/run"), code=2, say=f"set model.continuation: {REACH}")
    train(work, f"{work}/longer", f"model.continuation={REACH + 2}", "optim.lr=0", "optim.min_lr=0", more=("--init", f"{work}/run/ckpt/latest"))
    longer, _ = load(f"{work}/longer/{step}/model.safetensors")
    assert (longer["continuation"][:REACH] == b).all() and (longer["continuation"][REACH:] > 0).all()
    return b


def export(b):
    out = f"{work}/indexer"
    run("lsa-export", "write", f"{work}/run/ckpt/latest", "--out", out, "--pt", "--per-layer", "--gguf")
    run("lsa-export", "verify", out, "--checkpoint", f"{work}/run/ckpt/latest")
    tensors, meta = load(f"{out}/indexer.safetensors")
    assert len(tensors) == 12 and not any("continuation" in k for k in tensors), "servers load exactly the four tensors of each layer"
    assert (np.array(json.loads(meta["lsa.continuation"])["b"], np.float32) == b).all()
    card = open(f"{out}/README.md").read()
    assert "## Continuation" in card and f"{b[0]:.6g}" in card and "without" in card
    assert b"memidx.continuation" in open(f"{out}/indexer.gguf", "rb").read()
    golden = {}
    raw = open(f"{out}/golden.safetensors", "rb").read()
    n = struct.unpack("<Q", raw[:8])[0]
    for k, t in json.loads(raw[8 : 8 + n]).items():
        if t.get("dtype") == "F32":
            golden[k] = np.frombuffer(raw[8 + n + t["data_offsets"][0] : 8 + n + t["data_offsets"][1]], "<f4").reshape(t["shape"])
    for path in ("f32", "bf16", "fp8"):
        want = np.array([continued(z, b) for z in golden[f"{path}.score"]])
        assert (golden[f"{path}.continued"] == want).all() and (want != golden[f"{path}.score"]).any()
    save_file({"f32.continued": golden["f32.continued"].copy()}, f"{work}/right")
    save_file({"f32.continued": golden["f32.score"].copy()}, f"{work}/wrong")
    run("lsa-export", "verify", out, "--against", f"{work}/right")
    run("lsa-export", "verify", out, "--against", f"{work}/wrong", code=3, say="not continued")
    # there and back; a part of the layers has none, and is told so; no other ensemble
    run("lsa-export", "import", out, "--out", f"{work}/back")
    run("lsa-export", "write", f"{work}/back", "--out", f"{work}/twice")
    same(f"{out}/indexer.safetensors", f"{work}/twice/indexer.safetensors")
    run("lsa-export", "import", f"{out}/indexer.pt", "--out", f"{work}/pt")
    run("lsa-export", "write", f"{work}/pt", "--out", f"{work}/thrice")
    same(f"{out}/indexer.safetensors", f"{work}/thrice/indexer.safetensors")
    ordinal = str(json.loads(meta["lsa.geometry"])["layers"][0]["ordinal"])
    p = subprocess.run([f"{BIN}/lsa-export", "import", out, "--layers", ordinal, "--out", f"{work}/part"], capture_output=True, text=True)
    assert p.returncode == 0 and "continuation was made for all 3 layers" in p.stdout + p.stderr, p
    run("lsa-export", "write", f"{work}/run/ckpt/latest", "--out", f"{work}/max", "--ensemble", "max", code=2, say="belongs to the sum")
    run("lsa-export", "calibrate", out, "--data", f"{work}/shards", "--device", "cpu")
    assert "Thresholds of the continued sum" in open(f"{out}/README.md").read()
    run("lsa-export", "calibrate", out, "--data", f"{work}/shards", "--device", "cpu", "--fold", "0.10", code=1, say="continuation")
    return out


def abi(out, b):
    cache = open(f"{BUILD}/CMakeCache.txt").read()
    if "LSA_SANITIZE:STRING=" in cache and "LSA_SANITIZE:STRING=\n" not in cache:
        return print("not through the ABI: a sanitized library needs a sanitized program")
    x = r.Indexer(out, f"{BUILD}/lib/liblsa_indexer.so", max_batch=2, max_chunks=2048)
    rng, chunks = np.random.default_rng(5), np.array([1500, 37], np.int64)
    z = 4 * rng.standard_normal((3, 2, 1536)).astype(np.float32)
    for k, sink, tail in ((40, 0, 0), (9, 4, 20)):
        ids, counts = x.select(r.Rule(r.TOPK, r.EXPORTED, k, 0, 0.0, 0.0, sink, tail), z, chunks, 1536)
        for i, n in enumerate(chunks):
            s = continued((z[0, i, :n] + z[1, i, :n]) + z[2, i, :n], b)
            free = range(sink, n - tail)
            want = sorted([*range(sink), *sorted(free, key=lambda c: (-s[c], c))[:k], *range(n - tail, n)])
            assert ids[i, : counts[i]].tolist() == want, (k, i)
            plain = z[:, i, :n].sum(0)
            assert i or want != sorted([*range(sink), *sorted(free, key=lambda c: (-plain[c], c))[:k], *range(n - tail, n)])
    try:
        x.select(r.Rule(r.TOPK, r.MAX, 5, 0, 0.0, 0.0, 0, 0), z, chunks, 1536)
        sys.exit("the maximum was selected by, without the continuation")
    except RuntimeError as e:
        assert "continuation" in str(e), e
    x.close()


def decoder():
    """The teacher's own indexer with costs put into its export: too dear is as if there were none, cheap is not."""
    tokens = np.fromfile("recipes/mini/val.u16", "<u2", 3000)
    tokens[tokens > 1][:2048].tofile(f"{work}/short.u16")  # without id 0: one document
    val = ["--teacher", "recipes/mini/teacher", "--tokens", f"{work}/short.u16"]
    run("lsa-export", "import", "recipes/mini/teacher", "--out", f"{work}/native")
    run("lsa-export", "write", f"{work}/native", "--out", f"{work}/plain")
    tensors, meta = load(f"{work}/plain/indexer.safetensors")
    lines = []
    for name, cost in (("plain", None), ("dear", 1e6), ("cheap", 0.01)):
        if cost:
            os.makedirs(f"{work}/{name}")
            g = dict(json.loads(meta["lsa.geometry"]), continuation=16)
            more = {"lsa.geometry": json.dumps(g), "lsa.continuation": json.dumps({"b": [cost * (j + 1) for j in range(16)]})}
            save_file(tensors, f"{work}/{name}/indexer.safetensors", dict(meta, **more))
        said = run("lsa-decode", "validate", *val, "--indexer", f"{work}/{name}", "--policy", "lsa", "--budget", "0.10", "--json")
        lines.append({k: v for k, v in json.loads(said.splitlines()[0]).items() if k in ("nll", "captured", "kept", "misses_per_window")})
    assert lines[0] == lines[1] and lines[0]["captured"] != lines[2]["captured"], lines
    return lines


b = training()
out = export(b)
abi(out, b)
lines = decoder()
shutil.rmtree(work)
print("ok: costs", b.tolist(), "decoder", [round(x["captured"], 4) for x in (lines[0], lines[2])])
