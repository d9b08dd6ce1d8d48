#!/usr/bin/env python3
"""An observed-mass prior through the chain: what training saves, resumes, evaluates, exports and calibrates, and that the decoder's state matters: weights of 0 are as if there were none."""
import json
import os
import shutil
import struct
import sys
import tempfile

sys.path.insert(0, "tests/testkit")
from small_run import STEP as step, resumes_alike, run, same, train

os.environ["OMP_NUM_THREADS"] = "2"
work = tempfile.mkdtemp(prefix="lsa-prior-")


def header(path):
    raw = open(path, "rb").read()
    n = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def tensor(path, name):
    h, data = header(path)
    a, b = h[name]["data_offsets"]
    return struct.unpack(f"<{(b - a) // 4}f", data[a:b])


def training():
    run("lsa-dump", "synth", "--out", f"{work}/shards", "--docs", "8", "--tokens", "1024", "--layers", "3", "--hidden", "32")
    train(work, f"{work}/run", "model.prior=true", "model.continuation=3")
    w = tensor(f"{work}/run/{step}/model.safetensors", "prior")
    assert len(w) == 2 and json.loads(header(f"{work}/run/{step}/model.safetensors")[0]["__metadata__"]["lsa.geometry"])["prior"] is True
    assert all(v > 0 for v in tensor(f"{work}/run/{step}/optim.safetensors", "v.prior")), "no weight has moved: the test sees nothing"
    resumes_alike(work)
    said = run("lsa-train", "eval", f"{work}/run/ckpt/latest", "--data", f"{work}/shards", "--held-out", "--device", "cpu", say="observed mass added, continued over 3 chunks")
    assert "plain: without both" in said
    # off is off: the key left out and false give the same bytes
    train(work, f"{work}/off", "model.prior=false")
    train(work, f"{work}/absent")
    for f in ("model.safetensors", "optim.safetensors"):
        same(f"{work}/off/{step}/{f}", f"{work}/absent/{step}/{f}")
    train(work, f"{work}/none", "model.prior=true", "sample.candidates=sampled", code=2, say="sample.candidates: all")
    train(work, f"{work}/none", "model.prior=true", "window.stride=16", code=2, say="multiple of window.tau")
    train(work, f"{work}/none", "model.continuation=3", more=("--init", f"{work}/run"), code=2, say="set model.prior: true")
    train(work, f"{work}/more", "model.prior=true", "model.continuation=3", "optim.lr=0", "optim.min_lr=0", more=("--init", f"{work}/run/ckpt/latest"))
    assert tensor(f"{work}/more/{step}/model.safetensors", "prior") == w
    return w


def export(w):
    out = f"{work}/indexer"
    run("lsa-export", "write", f"{work}/run/ckpt/latest", "--out", out, "--pt", "--per-layer", "--gguf")
    run("lsa-export", "verify", out, "--checkpoint", f"{work}/run/ckpt/latest")
    h, _ = header(f"{out}/indexer.safetensors")
    assert len(h) == 13 and not any("prior" in k for k in h), "servers load exactly the four tensors of each layer"
    meta = json.loads(h["__metadata__"]["lsa.prior"])
    f32 = lambda x: struct.unpack("<f", struct.pack("<f", x))[0]
    assert tuple(f32(x) for x in meta["weights"]) == w and meta["decay"] == f32(0.9) and meta["unit"] == f32(0.001)
    card = open(f"{out}/README.md").read()
    assert "## Observed mass" in card and f"w_1 = {w[0]:.6g}" in card and "with neither this nor the continuation" in card
    assert b"memidx.prior" in open(f"{out}/indexer.gguf", "rb").read()
    for source, name in ((out, "back"), (f"{out}/indexer.pt", "pt")):
        run("lsa-export", "import", source, "--out", f"{work}/{name}")
        run("lsa-export", "write", f"{work}/{name}", "--out", f"{work}/{name}-twice")
        same(f"{out}/indexer.safetensors", f"{work}/{name}-twice/indexer.safetensors")
    run("lsa-export", "import", out, "--layers", "0", "--out", f"{work}/part", say="the continuation and the observed-mass prior were made for all 3 layers")
    run("lsa-export", "write", f"{work}/run/ckpt/latest", "--out", f"{work}/max", "--ensemble", "max", code=2, say="belongs to the sum")
    run("lsa-export", "calibrate", out, "--data", f"{work}/shards", "--device", "cpu")
    assert "lsa.prior" in header(f"{out}/indexer.safetensors")[0]["__metadata__"]
    run("lsa-export", "calibrate", out, "--data", f"{work}/shards", "--device", "cpu", "--fold", "0.10", code=1, say="continuation")


def decoder():
    """The teacher's own indexer with weights put into its export: 0 is as if there were none, others are not; generation takes them too."""
    raw = open("recipes/mini/val.u16", "rb").read(6000)
    tokens = [t for t in struct.unpack("<3000H", raw) if t > 1][:2048]  # without id 0: one document
    open(f"{work}/short.u16", "wb").write(struct.pack("<2048H", *tokens))
    run("lsa-export", "import", "recipes/mini/teacher", "--out", f"{work}/native")
    run("lsa-export", "write", f"{work}/native", "--out", f"{work}/plain")
    h, data = header(f"{work}/plain/indexer.safetensors")
    lines = []
    for name, weights in (("plain", None), ("zero", [0, 0]), ("recent", [2, 0]), ("memory", [0, 2])):
        if weights:
            os.makedirs(f"{work}/{name}")
            meta = h["__metadata__"]
            g = dict(json.loads(meta["lsa.geometry"]), prior=True)
            prior = {"weights": weights, "decay": 0.9, "unit": 0.001}
            text = json.dumps(dict(h, __metadata__=dict(meta, **{"lsa.geometry": json.dumps(g), "lsa.prior": json.dumps(prior)}))).encode()
            text += b" " * (-len(text) % 8)
            open(f"{work}/{name}/indexer.safetensors", "wb").write(struct.pack("<Q", len(text)) + text + data)
        said = run("lsa-decode", "validate", "--teacher", "recipes/mini/teacher", "--tokens", f"{work}/short.u16", "--indexer", f"{work}/{name}", "--policy", "lsa", "--budget", "0.10", "--json")
        line = next(json.loads(x) for x in said.splitlines() if x.startswith("{"))
        lines.append({k: line[k] for k in ("nll", "captured", "kept", "misses_per_window")})
    assert lines[0] == lines[1] and len({x["captured"] for x in lines}) == 3, lines
    run("lsa-decode", "generate", "--teacher", "recipes/mini/teacher", "--tokens", f"{work}/short.u16", "--indexer", f"{work}/recent", "--prompt", "700", "--new", "70")
    return [round(x["captured"], 4) for x in lines[1:]]


export(training())
print("ok: decoder", decoder())
shutil.rmtree(work)
