#!/usr/bin/env python3
"""Every file of an export through readers that are not ours: safetensors, gguf, zipfile + pickle; the round trips export -> import -> export;
the reference's checkpoints in; and a loader written from the reference's description alone, which must score as the golden vectors say."""
import collections
import filecmp
import json
import os
import struct
import subprocess
import sys
import tempfile

import gguf
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

sys.path.insert(0, "tests/testkit")
import torch_zip

BIN = os.environ["LSA_BIN"]
work = tempfile.TemporaryDirectory(prefix="lsa-export-")
W = work.name
TEACHER = "recipes/mini/teacher"
VARIANTS = ["--pt-freqs", "300", "--per-layer", "--gguf"]


def run(program, *args):
    p = subprocess.run([f"{BIN}/{program}", *args], capture_output=True, text=True)
    if p.returncode:
        sys.exit(f"{program} {' '.join(args)}: exit {p.returncode}\n{p.stderr}")
    return p.stderr


def write(ckpt, out, *options):
    run("lsa-export", "write", f"{W}/{ckpt}", "--out", f"{W}/{out}", *options)
    return f"{W}/{out}"


def same_folder(a, b):
    names = sorted(os.listdir(a))
    assert names == sorted(os.listdir(b)), (names, os.listdir(b))
    match, mismatch, errors = filecmp.cmpfiles(a, b, names, shallow=False)
    assert not mismatch and not errors, (a, b, mismatch, errors)


def tensors(path):
    """name -> (dtype name, array of raw values) and the metadata, from the bytes."""
    raw = open(path, "rb").read()
    n = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + n])
    meta = head.pop("__metadata__", {})
    kind = {"F32": "<f4", "BF16": "<u2", "F8_E4M3": "u1", "U8": "u1", "I32": "<i4", "I64": "<i8"}
    return {k: (v["dtype"], np.frombuffer(raw[8 + n :][v["data_offsets"][0] : v["data_offsets"][1]], kind[v["dtype"]]).reshape(v["shape"]))
            for k, v in head.items()}, meta


def widen(bf16):
    return (bf16.astype(np.uint32) << 16).view(np.float32)


def e4m3(code):
    c = code.astype(np.int64)
    e, m = (c >> 3) & 15, c & 7
    return (np.where(c & 128, -1.0, 1.0) * np.where(e == 0, m / 8 * 2.0**-6, (1 + m / 8) * 2.0 ** (e - 7))).astype(np.float32)


def values(path):
    """name -> f32 of a safetensors file of any weight type, by EXPORT_FORMAT.md."""
    t, meta = tensors(path)
    out = {}
    for name, (dtype, x) in t.items():
        if name.endswith("_scale"):
            continue
        if dtype == "F8_E4M3":
            scale = t[name + "_scale"][1]
            assert scale.shape == (x.shape[0], 1) and (np.frexp(scale)[0] == 0.5).all(), "scales are powers of two, one a row"
            x = e4m3(x) * scale
        out[name] = widen(x) if dtype == "BF16" else x
    return out, meta


def trained():
    """A trained checkpoint, so that there is provenance to keep."""
    run("lsa-dump", "synth", "--out", f"{W}/shards", "--docs", "4", "--tokens", "640", "--layers", "2", "--hidden", "32")
    run("lsa-train", "run", "--recipe", "recipes/smoke.yaml", "--data", f"{W}/shards", "--out", f"{W}/run", "--device", "cpu", "--set", "train.steps=2",
        "--set", "sample.val_documents=1", "--set", "train.eval_every=2")


def variants():
    run("lsa-export", "import", TEACHER, "--out", f"{W}/native")
    exact, _ = values(write("native", "plain") + "/indexer.safetensors")
    for dtype in ("f32", "bf16", "fp8"):
        d = write("native", dtype, "--dtype", dtype, *VARIANTS)
        same_folder(d, write("native", dtype + "-again", "--dtype", dtype, *VARIANTS))
        run("lsa-export", "verify", d, "--checkpoint", f"{W}/native")
        t, meta = tensors(d + "/indexer.safetensors")
        name = {"f32": "F32", "bf16": "BF16", "fp8": "F8_E4M3"}[dtype]
        assert meta["lsa.dtype"] == name and meta["format"] == "pt"
        assert all(v[0] == ("F32" if k.endswith(("q_norm_weight", "_scale")) else name) for k, v in t.items())
        joint, _ = values(d + "/indexer.safetensors")
        assert joint.keys() == exact.keys()
        for k, v in exact.items():
            if dtype == "f32" or k.endswith("q_norm_weight"):
                assert np.array_equal(joint[k], v)
            elif dtype == "bf16":
                assert (np.abs(joint[k] - v) <= np.abs(v) * 2.0**-8).all()
            else:  # half a step of three mantissa bits, or of the smallest code
                scale = t[k + "_scale"][1]
                assert (np.abs(joint[k] - v) <= np.maximum(np.abs(v) / 16, scale * 2.0**-10)).all()
        with safe_open(d + "/indexer.safetensors", "numpy") as f:
            assert set(f.keys()) == set(t)
            if dtype == "f32":
                assert all(np.array_equal(f.get_tensor(k), exact[k]) for k in exact)
        per_layer(d, joint, json.loads(meta["lsa.geometry"]))
        archive(d, joint, dtype)
        sidecar(d, joint, meta, dtype)
    # fewer files on request, and none that were not asked for
    assert sorted(os.listdir(f"{W}/plain")) == ["README.md", "check_indexer.py", "golden.safetensors", "indexer.safetensors"]
    d = write("native", "pt", "--pt")
    state, _ = torch_zip.load(d + "/indexer.pt")
    assert list(state) == list(exact)  # no tables
    print("variants: f32, bf16, fp8 in four containers")


def per_layer(d, joint, geometry):
    for layer in geometry["layers"]:
        one, meta = values(f"{d}/layer_{layer['id']:02d}.safetensors")
        assert set(one) == {"wq_a.weight", "wq_b.weight", "q_norm_weight", "weights_proj.weight"}
        assert all(np.array_equal(v, joint[f"retrievers.l{layer['ordinal']}.{k}"]) for k, v in one.items())
        assert json.loads(meta["lsa.geometry"])["layers"] == [layer] and "lsa.calibration" not in meta


def archive(d, joint, dtype):
    state, begin = torch_zip.load(d + "/indexer.pt")
    assert type(state) is collections.OrderedDict
    assert all(at % 64 == 0 for at in begin.values()), begin
    tables = [k for k in state if k.endswith(".freqs_cis")]
    assert {k for k in state if k not in tables} == set(joint)
    for k, v in joint.items():
        assert np.array_equal(state[k] if state[k].dtype == np.float32 else widen(state[k]), v), k
        assert state[k].dtype == (np.float32 if dtype == "f32" or k.endswith("q_norm_weight") else np.uint16)
    with safe_open(d + "/golden.safetensors", "numpy") as f:
        freq = f.get_tensor("freq")
    assert len(tables) == 3 and all(state[k].shape == (300, 32) and state[k].dtype == np.complex64 for k in tables)
    angle = (np.arange(300, dtype=np.float32)[:, None] * freq).astype(np.float64)
    want = np.cos(angle).astype(np.float32) + 1j * np.sin(angle).astype(np.float32)
    assert np.abs(state[tables[0]] - want).max() < 1e-7


def sidecar(d, joint, meta, dtype):
    r = gguf.GGUFReader(d + "/indexer.gguf")
    key = lambda k: r.fields[k].contents()
    geometry, select = json.loads(meta["lsa.geometry"]), json.loads(meta["lsa.select"])
    assert key("GGUF.version") == 3 and key("general.architecture") == "memidx" and r.alignment == 32
    assert key("memidx.head_count") == geometry["n_head"] and key("memidx.rank") == geometry["rank"] and key("memidx.embedding_length") == geometry["hidden"]
    assert key("memidx.layers.ordinal") == [x["ordinal"] for x in geometry["layers"]]
    assert key("memidx.layers.id") == [x["id"] for x in geometry["layers"]]
    assert key("memidx.rope.freq_base") == geometry["rope"]["base"] and key("memidx.rope.scaling.factor") == geometry["rope"]["factor"]
    assert key("memidx.rope.scaling.original_context_length") == geometry["rope"]["original_len"]
    assert key("memidx.ensemble") == select["ensemble"] and key("memidx.window") == select["tau"] and key("memidx.tail") == select["tail"]
    assert key("memidx.threshold") == select["threshold"] and key("memidx.weight_type") == dtype
    assert json.loads(key("memidx.train")) == json.loads(meta["lsa.train"]) and "memidx.calibration" not in r.fields
    found = {t.name: t for t in r.tensors}
    assert len(found) == len(joint)
    for layer in geometry["layers"]:
        for part, name in (("wq_a.weight",) * 2, ("wq_b.weight",) * 2, ("q_norm.weight", "q_norm_weight"), ("weights_proj.weight",) * 2):
            t, want = found[f"blk.{layer['id']}.memidx.{part}"], joint[f"retrievers.l{layer['ordinal']}.{name}"]
            assert t.data_offset % 32 == 0 and [int(x) for x in t.shape] == list(want.shape)[::-1]
            bf16 = t.tensor_type == gguf.GGMLQuantizationType.BF16
            assert bf16 == (dtype != "f32" and part != "q_norm.weight")
            got = widen(t.data.view(np.uint16)) if bf16 else t.data
            assert np.array_equal(got.reshape(want.shape), want), t.name


def calibrated(folder, out):
    """An export that lsa-export calibrate has measured, imported and made again in all variants."""
    run("lsa-export", "calibrate", folder, "--data", f"{W}/shards", "--device", "cpu", "--out", f"{W}/measured")
    run("lsa-export", "import", f"{W}/measured", "--out", f"{W}/{out}-ckpt")
    return write(out + "-ckpt", out, *VARIANTS)


def round_trips():
    start = write("run", "trained", "--ensemble", "max", "--threshold", "0.375", *VARIANTS)
    meta = tensors(start + "/indexer.safetensors")[1]
    assert json.loads(meta["lsa.train"])["step"] == 2 and json.loads(meta["lsa.select"])["ensemble"] == "max"
    folders = {"f32": start, "calibrated": calibrated(start, "calibrated")}
    for dtype in ("bf16", "fp8"):
        folders[dtype] = write("run", "trained-" + dtype, "--dtype", dtype, *VARIANTS)
    assert "lsa.calibration" in tensors(folders["calibrated"] + "/indexer.safetensors")[1]
    assert "memidx.calibration" in gguf.GGUFReader(folders["calibrated"] + "/indexer.gguf").fields
    for name, folder in folders.items():
        for i, source in enumerate((folder, folder + "/indexer.safetensors", folder + "/indexer.pt")):
            run("lsa-export", "import", source, "--out", f"{W}/back-{name}-{i}")
            same_folder(folder, write(f"back-{name}-{i}", f"out-{name}-{i}", *VARIANTS))
    # other weights are not what was calibrated; a part of the layers neither
    d = write("back-calibrated-0", "requantised", "--dtype", "bf16")
    assert "lsa.calibration" not in tensors(d + "/indexer.safetensors")[1]
    assert "calibration" in run("lsa-export", "import", folders["calibrated"], "--out", f"{W}/part", "--layers", "1")
    assert "lsa.calibration" not in tensors(write("part", "part-out") + "/indexer.safetensors")[1]
    # a single layer comes back as itself
    run("lsa-export", "import", sorted(f"{start}/{x}" for x in os.listdir(start) if x.startswith("layer_"))[1], "--out", f"{W}/one")
    one, whole = values(write("one", "one-out") + "/indexer.safetensors")[0], values(start + "/indexer.safetensors")[0]
    assert len(one) == 4 and all(k.startswith("retrievers.l1.") and np.array_equal(v, whole[k]) for k, v in one.items())
    # and starts a run, also a wider one
    run("lsa-train", "run", "--recipe", "recipes/smoke.yaml", "--data", f"{W}/shards", "--out", f"{W}/warm", "--device", "cpu", "--init", f"{W}/back-fp8-0",
        "--set", "train.steps=1", "--set", "sample.val_documents=0", "--set", "train.eval_every=0", "--set", "model.rank=64")
    print(f"round trips: {len(folders)} exports from folder, safetensors and pt, byte for byte")


def reference(rank=16, heads=8, hidden=4096, layers=(10, 12, 20), seed=3):
    rng = np.random.default_rng(seed)
    shapes = {"wq_a.weight": (rank, hidden), "wq_b.weight": (heads * 128, rank), "q_norm_weight": (rank,), "weights_proj.weight": (heads, hidden)}
    return {f"retrievers.l{o}.{k}": (1 + 0.1 * rng.standard_normal(s) if len(s) == 1 else rng.standard_normal(s) / np.sqrt(s[-1])).astype(np.float32)
            for o in layers for k, s in shapes.items()}


def reference_files():
    """What the reference trainer and its followers leave behind, in the ways torch would write it."""
    want = reference()
    bf16 = lambda x: (x.view(np.uint32) >> 16).astype(np.uint16)
    table = np.ones((7, 32), np.complex64)
    flat = collections.OrderedDict(want)
    for o in (10, 12, 20):
        flat[f"retrievers.l{o}.freqs_cis"] = table
    save_file(want, f"{W}/ref.safetensors")
    torch_zip.save(f"{W}/flat.pt", flat)
    torch_zip.save(f"{W}/epoch.pt", {"epoch": 3, "model_state": flat, "optimizer": {"state": {0: {"step": np.float32([2]), "exp_avg": want["retrievers.l10.wq_a.weight"]}},
                   "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0, 1, 2], "foreach": None}]}, "avg_loss": 0.25, "args": {"layer": 70000, "dir": "x" * 300}})
    torch_zip.save(f"{W}/half.pt", {k: bf16(v) for k, v in want.items()})
    for name in ("ref.safetensors", "flat.pt", "epoch.pt", "half.pt"):
        said = run("lsa-export", "import", f"{W}/{name}", "--out", f"{W}/of-{name}")
        assert "DeepSeek-V4-Flash" in said and "160000" in said and "65536" in said, said
        got, meta = values(write(f"of-{name}", f"ix-{name}") + "/indexer.safetensors")
        g = json.loads(meta["lsa.geometry"])
        assert [(x["ordinal"], x["id"]) for x in g["layers"]] == [(10, 22), (12, 26), (20, 42)]
        assert (g["n_head"], g["rank"], g["hidden"]) == (8, 16, 4096)
        assert g["rope"] == {"dim": 64, "base": 160000, "factor": 16, "original_len": 65536, "beta_fast": 32, "beta_slow": 1} and abs(g["eps"] - 1e-6) < 1e-12
        assert all(np.array_equal(got[k], widen(bf16(v)) if name == "half.pt" else v) for k, v in want.items())
    # one layer: without prefix, and under the pretrained names; a folder of those
    one = {k.split(".", 2)[2]: v for k, v in want.items() if k.startswith("retrievers.l12.")}
    pretrained = {k if k == "wq_a.weight" else "q_norm.weight" if k == "q_norm_weight" else "indexer." + k: v for k, v in one.items()}
    os.mkdir(f"{W}/folder")
    torch_zip.save(f"{W}/one.pt", one)
    save_file(pretrained, f"{W}/pretrained.safetensors")
    for layer_id in (22, 26):
        save_file(pretrained, f"{W}/folder/layer_{layer_id:02d}.safetensors")
    for name, options, ords in (("one.pt", ["--layers", "12"], [12]), ("pretrained.safetensors", ["--layers", "12"], [12]), ("folder", [], [10, 12])):
        run("lsa-export", "import", f"{W}/{name}", "--out", f"{W}/of-{name}", *options)
        got, _ = values(write(f"of-{name}", f"ix-{name}") + "/indexer.safetensors")
        assert len(got) == 4 * len(ords)
        assert all(np.array_equal(got[f"retrievers.l{o}.{k}"], v) for o in ords for k, v in one.items())
    # another model's constants
    small = {k: v for k, v in reference(hidden=256, layers=(0, 2)).items()}
    save_file(small, f"{W}/small.safetensors")
    run("lsa-export", "import", f"{W}/small.safetensors", "--out", f"{W}/of-small", "--teacher", TEACHER)
    g = json.loads(tensors(write("of-small", "ix-small") + "/indexer.safetensors")[1]["lsa.geometry"])
    assert [(x["ordinal"], x["id"]) for x in g["layers"]] == [(0, 1), (2, 5)] and g["rope"]["original_len"] == 4096
    print("reference files: flat, epoch, bf16, single, pretrained, folder of layers")


class Loader:
    """From the reference's description alone: joint prefix detected, heads and rank from the shapes, YaRN table from its constants."""

    def __init__(self, path):
        state, _ = torch_zip.load(path)
        joint = any(k.startswith("retrievers.l") for k in state)
        assert joint
        self.layers = collections.OrderedDict()
        for k, v in state.items():
            prefix, layer, name = k.split(".", 2)
            if name in ("wq_a.weight", "wq_b.weight", "q_norm_weight", "weights_proj.weight"):  # others are passed over
                self.layers.setdefault(int(layer[1:]), {})[name] = v.astype(np.float32)
        i = np.arange(32)
        g = np.float32(1) / (160000.0 ** (i / 32)).astype(np.float32)  # the table is fp32; its power is accurate
        low, high = 15, 25
        ramp = np.clip((i - low).astype(np.float32) / np.float32(high - low), 0, 1).astype(np.float32)
        self.freq = (g / np.float32(16) * ramp + g * (np.float32(1) - ramp)).astype(np.float32)
        h = np.ones((1, 1))
        while len(h) < 128:
            h = np.block([[h, h], [h, -h]])
        self.hadamard = h / np.sqrt(128)

    def logits(self, ordinal, x, position, keys):
        t = {k: v.astype(np.float64) for k, v in self.layers[ordinal].items()}
        heads = t["wq_b.weight"].shape[0] // 128
        a = x.astype(np.float64) @ t["wq_a.weight"].T
        u = t["q_norm_weight"] * a / np.sqrt((a * a).mean(1, keepdims=True) + 1e-6)
        q = (u @ t["wq_b.weight"].T).reshape(len(x), heads, 128)
        angle = (position.astype(np.float32)[:, None] * self.freq).astype(np.float64)[:, None]
        c, s, even, odd = np.cos(angle), np.sin(angle), q[..., 64::2].copy(), q[..., 65::2].copy()
        q[..., 64::2], q[..., 65::2] = even * c - odd * s, even * s + odd * c
        q = q @ self.hadamard
        w = x.astype(np.float64) @ t["weights_proj.weight"].T / np.sqrt(128 * heads)
        k = e4m3(keys[:, :128]).astype(np.float64) * keys[:, 128:].copy().view("<f4")
        return np.einsum("mh,mhs->ms", w, np.maximum(q @ k.T, 0))


def independent_loader():
    """A V4-Flash geometry: the archive alone must score as golden.safetensors says, with and without the tables."""
    for options in (["--pt"], ["--pt-freqs", "500"]):
        d = write("of-flat.pt", "flash" + options[-1], *options)
        run("lsa-export", "verify", d)
        loader = Loader(d + "/indexer.pt")
        assert list(loader.layers) == [10, 12, 20]
        g = {k: widen(v) if dtype == "BF16" else v for k, (dtype, v) in tensors(d + "/golden.safetensors")[0].items()}
        published = {0: 1, 1: 0.68765602, 14: 5.2868563e-3, 15: 3.6355386e-3, 16: 2.265625e-3, 20: 2.9697778e-4, 24: 1.953125e-5, 25: 5.3723127e-6, 31: 5.6805290e-7}
        assert all(abs(loader.freq[i] / v - 1) < 5e-7 for i, v in published.items()), [(i, loader.freq[i] / v - 1) for i, v in published.items()]
        assert np.array_equal(loader.freq, g["freq"]), "one step of fp32 in a frequency turns position 1,000,000 by 0.06"
        worst = 0
        for o in loader.layers:
            z, want = loader.logits(o, g[f"l{o}.hidden"], g["position"], g[f"l{o}.key"]), g[f"l{o}.logit"]
            worst = max(worst, np.abs(z - want).max() / np.sqrt((want**2).mean()))
        print(f"independent loader: logits within {worst:.2g} of rms")
        assert worst < 1e-5


trained()
variants()
round_trips()
reference_files()
independent_loader()
print("ok")
