#!/usr/bin/env python3
"""Planted faults: an engine of this file's own (numpy, f32, written from notes of FlashMemory 5.1 to 5.3 and 2) with one convention wrong at a time must be
refused, and the convention named, by check_indexer.py and by `lsa-export verify --against`; the same engine with nothing wrong must pass."""
import importlib.util
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # hundreds of short runs: waking threads costs more than they save
import numpy as np  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

BIN = os.environ["LSA_BIN"]
F = np.float32
work = tempfile.mkdtemp(prefix="lsa-conform-")


def run(*args, code=0):
    p = subprocess.run([f"{BIN}/{args[0]}", *args[1:]], capture_output=True, text=True)
    if p.returncode != code:
        sys.exit(f"{' '.join(args)}: exit {p.returncode}, expected {code}\n{p.stdout}{p.stderr}")
    return p.stdout + p.stderr


def load(path):
    with safe_open(path, "numpy") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def read(path):
    """Plain reader: numpy has no bfloat16, so those come as f32."""
    data = open(path, "rb").read()
    n = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + n])
    meta, out = head.pop("__metadata__"), {}
    for k, t in head.items():
        b, e = (8 + n + o for o in t["data_offsets"])
        kind = {"F32": "<f4", "U8": "u1", "I32": "<i4", "I64": "<i8", "BF16": "<u2"}[t["dtype"]]
        x = np.frombuffer(data[b:e], kind).reshape(t["shape"])
        out[k] = np.left_shift(x.astype("<u4"), 16).view("<f4") if t["dtype"] == "BF16" else x
    return out, meta


# ---- the engine ----
def to_bf16(x):
    """Nearest of the two neighbours with 16 bits, ties to the even one."""
    x = np.ascontiguousarray(x, F)
    low = (x.view("u4") & 0xFFFF0000).view(F)
    high = (((x.view("u4") >> 16) + 1) << 16).astype("u4").view(F)
    below, above = np.abs(x - low), np.abs(high - x)
    odd = (low.view("u4") >> 16) & 1
    return np.where((above < below) | ((above == below) & (odd == 1)), high, low)


MAGNITUDES = np.array([m * 2.0**-9 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1])


def to_e4m3(x):
    i = np.searchsorted((MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2, np.abs(x))
    i = np.where((i < 126) & (np.abs(x) == (MAGNITUDES[np.minimum(i + 1, 126)] + MAGNITUDES[i]) / 2) & (i % 2 == 1), i + 1, i)
    return (np.sign(x) * MAGNITUDES[i]).astype(F)


def walsh(x):
    h = 1
    while h < 128:
        y = x.reshape(*x.shape[:-1], 64 // h, 2, h)
        x = np.stack([y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]], -2).reshape(x.shape)
        h *= 2
    return x


def yarn(dim, base, factor, length, fast, slow):
    i = np.arange(0, dim, 2, dtype=F)
    f = F(1) / (F(base) ** (i.astype(np.float64) / dim)).astype(F)
    if factor == 1:
        return f

    def turns(b):
        return dim * np.log(length / (2 * np.pi * b)) / (2 * np.log(base))

    lo, hi = max(np.floor(turns(fast)), 0), min(np.ceil(turns(slow)), dim - 1)
    blend = np.clip((np.arange(dim // 2) - lo) / (hi - lo), 0, 1).astype(F)
    return (f / F(factor) * blend + f * (F(1) - blend)).astype(F)


class Engine:
    def __init__(self, folder, path, plant=""):
        self.w, meta = load(f"{folder}/indexer.safetensors")
        self.geo = json.loads(meta["lsa.geometry"])
        self.ids = {x["ordinal"]: x["id"] for x in self.geo["layers"]}
        self.path, self.plant = path, plant
        self.hidden_of = {}

    def stages(self, ord_, hidden, position, rows):
        """All queries of one layer: a dict of stages."""
        p, geo = self.plant, self.geo
        H, d = geo["n_head"], geo["hidden"]
        weights_of = ord_
        if p == "layer-map ids" and self.ids[ord_] in self.ids:
            weights_of = self.ids[ord_]
        if p == "layer-map swapped" and ord_ < 2:
            weights_of = 1 - ord_
        x = np.asarray(hidden, F)
        if p == "layer-map hidden":
            x = self.hidden_of[max(self.ids) - ord_]
        if p != "hidden-bf16":
            x = to_bf16(x)
        wa, wb, g, ww = (self.w[f"retrievers.l{weights_of}.{n}"] for n in ("wq_a.weight", "wq_b.weight", "q_norm_weight", "weights_proj.weight"))
        if p == "hidden-norm":
            x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + F(1e-6))
        a = x @ wa.T
        eps = F(1e-5 if p == "q-norm-eps" else geo["eps"])
        u = a if p == "q-norm" else a * g / np.sqrt(np.mean(np.square(a), axis=1, keepdims=True) + eps)
        q = u @ wb.T
        q = np.moveaxis(q.reshape(-1, 128, H), 1, 2) if p == "heads-transposed" else q.reshape(-1, H, 128)
        q = np.ascontiguousarray(q)
        rounded = (lambda v: v) if self.path == "f32" else to_bf16
        out = {"a": a, "u": u, "raw": q}
        q = rounded(q)
        out["bf16.raw"] = q
        r = dict(geo["rope"])
        if p == "rope-base":
            r["base"] = 10000
        if p == "rope-no-yarn":
            r["factor"] = 1
        if p == "rope-yarn-factor":
            r["factor"] = 4
        if p == "rope-yarn-length":
            r["original_len"] = 65536 if r["original_len"] == 4096 else 4096
        if p == "rope-unknown":
            r["base"] = 123456
        f = yarn(r["dim"], r["base"], r["factor"], r["original_len"], r["beta_fast"], r["beta_slow"])
        position = np.asarray(position) + (1 if p == "position-shift" else 0)
        if p == "position-clamp":
            position = np.minimum(position, 131071)
        angle = position[:, None] * f.astype(float) if p == "rope-angle" else (position.astype(F)[:, None] * f).astype(float)
        turn = np.exp(-1j * angle if p == "rope-direction" else 1j * angle)[:, None]
        if p == "rope-magnitude":
            turn = turn * (0.1 * np.log(r["factor"]) + 1)
        if p == "rope-missing":
            turn = np.ones_like(turn)
        n = r["dim"]
        part = q[..., :n] if p == "rope-first" else q[..., 128 - n :]
        z = part[..., : n // 2] + 1j * part[..., n // 2 :] if p == "rope-halves" else part[..., 0::2] + 1j * part[..., 1::2]
        z = z * turn
        if p == "rope-halves":
            part = np.concatenate([z.real, z.imag], -1)
        else:
            part = np.stack([z.real, z.imag], -1).reshape(part.shape)
        q = np.concatenate([part, q[..., n:]] if p == "rope-first" else [q[..., : 128 - n], part], -1).astype(F)
        q = rounded(q)
        out["rope"] = out["bf16.rope"] = q
        if p != "no-hadamard":
            q = walsh(q) / (F(1) if p == "hadamard-scale" else F(np.sqrt(128)))
        out["q"] = out["bf16.q"] = q
        w = x @ ww.T * F({"scale-missing": 1, "scale-heads": (128 * 64) ** -0.5, "scale-unknown": 3}.get(p, (128 * H) ** -0.5))
        out["w"] = w
        k = np.where(rows[:, :128] & 128, -1, 1) * np.append(MAGNITUDES, np.nan)[rows[:, :128] & 127]
        k = k.astype(F) * (F(1) if p == "key-scale" else rows[:, 128:].copy().view("<f4"))
        relu = (lambda v: v) if p == "relu-missing" else (lambda v: np.maximum(v, 0))
        if self.path == "fp8":
            scale = np.maximum(np.abs(q).max(-1), F(1e-4)) / F(448)
            code = to_e4m3(q / scale[..., None])
            out["fp8.code"], out["fp8.scale"], out["fp8.w"] = code, scale, w * scale
            q, w = code, w * scale
            out["q_value"] = code * scale[..., None]
        dots = relu(q @ k.T)  # [m, H, n]
        z = np.zeros((len(x), len(rows)), F)
        for h in range(0, H, 64):
            z = z + np.einsum("mh,mhn->mn", w[:, h : h + 64], dots[:, h : h + 64])
        out["logit"] = out["bf16.logit"] = out["fp8.logit"] = z
        return out

    def score(self, ordinal, hidden, position, key_rows, with_q=False):
        """What check_indexer.py calls."""
        if self.plant == "layer-map hidden":
            self.hidden_of = {o: self.golden[f"l{o}.hidden"][self.golden["position"] == position] for o in self.ids}
        s = self.stages(ordinal, hidden[None], np.array([position]), key_rows)
        return (s["logit"][0], s.get("q_value", s["q"])[0]) if with_q else s["logit"][0]


def vectors(engine, golden, names):
    """The file for --against: these stages of every layer."""
    out = {}
    for o in engine.ids:
        x = golden[f"l{o}.hidden"]
        if engine.plant == "hidden-bf16":
            x = x * np.where(np.arange(x.shape[1]) % 2, F(1 - 2.0**-10), F(1 + 2.0**-10))
        engine.hidden_of = {i: golden[f"l{i}.hidden"] for i in engine.ids}
        s = engine.stages(o, x, golden["position"], golden[f"l{o}.key"])
        for n in names:
            out[f"l{o}.{n}"] = np.ascontiguousarray(s[n])
    return out


STAGES = {"f32": ["a", "u", "raw", "rope", "q", "w", "logit"], "bf16": ["bf16.raw", "bf16.rope", "bf16.q", "bf16.logit"],
          "fp8": ["fp8.scale", "fp8.w", "fp8.logit"]}
PLANTS = ["no-hadamard", "hadamard-scale", "rope-halves", "rope-first", "rope-missing", "rope-direction", "rope-base", "rope-no-yarn", "rope-yarn-factor",
          "rope-yarn-length", "rope-magnitude", "rope-angle", "position-shift", "position-clamp", "scale-missing", "scale-heads", "heads-transposed", "hidden-norm",
          "hidden-bf16", "q-norm", "q-norm-eps", "relu-missing", "key-scale", "layer-map ids", "layer-map swapped", "layer-map hidden"]
ONLY_F32 = {"hidden-bf16", "rope-angle"}  # smaller than the rounding of the other paths
# Logits alone do not tell these apart; q does.
SAME_LOGITS = {"hadamard-scale": "scale-missing", "scale-missing": "hadamard-scale"}


def checker(folder):
    spec = importlib.util.spec_from_file_location("check_indexer", f"{folder}/check_indexer.py")
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m


def refused(call):
    """The message of a refusal; ends the test if there is none."""
    try:
        call()
    except ValueError as e:
        return str(e)
    return None


def named(message):
    return re.findall(r"(?:^|: |or )([a-z0-9-]+): ", message or "")


def against(folder, tensors, code):
    save_file(tensors, f"{work}/engine.safetensors")
    return run("lsa-export", "verify", folder, "--against", f"{work}/engine.safetensors", code=code)


def judge(folder, known):
    """Every plant on every path, by both checkers."""
    golden, _ = read(f"{folder}/golden.safetensors")
    check = checker(folder).check
    r = Engine(folder, "f32").geo["rope"]
    f = yarn(r["dim"], r["base"], r["factor"], r["original_len"], r["beta_fast"], r["beta_slow"])
    assert np.abs(f / golden["freq"] - 1).max() < 2e-7
    worst, count, weakest = {}, 0, dict.fromkeys(STAGES, 1.0)
    for path in STAGES:
        right = Engine(folder, path)
        worst[path] = max(check(folder, right.score, path), check(folder, lambda *a, e=right: e.score(*a, with_q=True), path))
        against(folder, vectors(right, golden, STAGES[path]), 0)
        for plant in PLANTS:
            name = plant.split()[0]
            if (path != "f32" and plant in ONLY_F32) or (plant == "scale-heads" and right.geo["n_head"] == 64):
                continue
            e = Engine(folder, path, plant)
            e.golden = golden
            with_q = refused(lambda: check(folder, lambda *a: e.score(*a, with_q=True), path))
            stages = vectors(e, golden, STAGES[path])
            messages = {"python, logits and q": with_q, "C, stages": against(folder, stages, 3)}
            if path == "f32":
                messages["C, logits"] = against(folder, {k: v for k, v in stages.items() if k.endswith("logit")}, 3)
                messages["python, logits"] = refused(lambda: check(folder, e.score, path))
            weakest[path] = min(weakest[path], float(re.search("off by ([^ ]+)", with_q)[1]))
            for who, m in messages.items():
                allowed = {name} | ({SAME_LOGITS.get(name)} if "q" not in who.split(", ")[1] and "stages" not in who else set())
                assert m is not None, f"{folder}, {path}, {plant}: {who} passes it"
                found = set(named(m)) & known
                assert name in found and found <= allowed, f"{folder}, {path}, {plant}: {who} says {found}: {m}"
                count += 1
            if plant == "layer-map ids" and path == "f32":
                assert "ids mixed up" in messages["C, logits"] and "c1" in messages["C, logits"], messages
        other = Engine(folder, "f32" if path == "fp8" else "fp8")
        m = refused(lambda: check(folder, other.score, path))
        assert set(named(m)) & known == {"numeric-path"}, (path, m)
        mine = "logit" if path == "f32" else f"{path}.logit"
        m = against(folder, {k.replace("fp8.logit", mine): v for k, v in vectors(other, golden, ["fp8.logit"]).items()}, 3)
        assert set(named(m)) & known == {"numeric-path"}, (path, m)
    print(f"{folder.split('/')[-1]}: {count} refusals name their convention; a right engine is within " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items())
          + "; the weakest fault: " + ", ".join(f"{k} {v:.1e}" for k, v in weakest.items()))
    return golden


def selections(folder, golden, ensemble):
    """Scores and kept sets of an engine: right ones pass, each wrong rule is named."""
    e = Engine(folder, "f32")
    z = np.stack([vectors(e, golden, ["logit"])[f"l{o}.logit"] for o in e.ids]).astype(float)
    p = 1 / (1 + np.exp(-z))
    rules = {"sum": z.sum(0), "mean": p.mean(0), "max": p.max(0)}
    score, k, n = rules.pop(ensemble).astype(F), golden["f32.k"], z.shape[2]
    cut = F(0 if ensemble == "sum" else 0.5)

    def top(order):
        kept = np.zeros((len(k), n), np.uint8)
        for i in range(len(k)):
            kept[i, sorted(range(n), key=lambda c: order(i, c))[: k[i]]] = 1
        return kept

    good = {"f32.score": score, "f32.top": top(lambda i, c: (-score[i, c], c)), "f32.above": (score > cut).astype(np.uint8)}
    against(folder, good, 0)
    for wrong, needle in [({"f32.top": top(lambda i, c: (-score[i, c], -c))}, "ties: "), ({"f32.above": (score >= cut).astype(np.uint8)}, "threshold: "),
                          ({"f32.top": top(lambda i, c: (score[i, c], c))}, "expected"), ({"f32.above": np.zeros((len(k), n), np.uint8)}, "expected")] + [
                              ({"f32.score": r.astype(F)}, "ensemble: ") for r in rules.values()]:
        m = against(folder, wrong, 3)
        assert needle in m or (needle == "expected" and "ties: " in m), (needle, m)


def not_named(folder, golden, known):
    """Faults outside the table: a hint, never a wrong name; not a number; files that are not what they should be."""
    for plant, needle in (("rope-unknown", "position 0 agrees"), ("scale-unknown", "times the expected ones: a scale")):
        m = against(folder, vectors(Engine(folder, "f32", plant), golden, ["logit"]), 3)
        assert needle in m and not set(named(m)) & known, m
    good = vectors(Engine(folder, "f32"), golden, STAGES["f32"])
    check = checker(folder).check
    for bad in (np.nan, np.inf, -np.inf):
        for name in ("l1.logit", "l2.q", "l0.w"):
            v = {k: x.copy() for k, x in good.items()}
            v[name].flat[-1] = bad
            assert "not finite" in against(folder, v, 3)

        def score(ordinal, hidden, position, rows, b=bad):
            z = Engine(folder, "f32").score(ordinal, hidden, position, rows)
            z[5] = b if position == 61 else z[5]
            return z

        assert refused(lambda: check(folder, score)) is not None
    v = {k: x.copy() for k, x in good.items()}
    v["l1.u"][2] *= F(1.001)
    m = against(folder, v, 3)
    assert "'u'" in m and "c1" in m and "70003" in m, m  # the first wrong stage, where
    assert "no counterpart" in against(folder, {"l44.logit": good["l0.logit"]}, 3)
    assert "must be" in against(folder, {"l0.logit": good["l0.logit"][:, 1:].copy()}, 3)
    assert "other inputs" in against(folder, {"position": golden["position"] + 1, "l0.logit": good["l0.logit"]}, 3)
    against(folder, {"l0.logit": good["l0.logit"].astype(np.float64), "position": golden["position"].copy()}, 0)
    run("lsa-export", "verify", folder, "--against", f"{work}/nowhere", code=1)
    run("lsa-export", "verify", folder, "--against", f"{work}/nowhere", "--checkpoint", folder, code=2)


def damage(folder):
    """Any flipped bit of either file is refused by both checkers; so is another version."""
    check = checker(folder).check
    bad, rng = f"{work}/bad", random.Random(7)
    shutil.copytree(folder, bad)

    def both(what):
        p = subprocess.run([f"{BIN}/lsa-export", "verify", bad], capture_output=True, text=True)
        assert p.returncode == 3, f"{what}: verify exits {p.returncode}: {p.stdout}{p.stderr}"
        try:
            check(bad, Engine(folder, "f32").score)
        except (ValueError, KeyError, TypeError, AttributeError):
            return p.stderr
        raise AssertionError(f"{what}: check_indexer.py passes it")

    for name, flips in (("golden.safetensors", 80), ("indexer.safetensors", 12)):
        data = open(f"{folder}/{name}", "rb").read()
        header = 8 + struct.unpack("<Q", data[:8])[0]
        spots = [rng.randrange(8, header) for _ in range(flips // 2)] + [rng.randrange(header, len(data)) for _ in range(flips // 2)]
        for at in spots:
            b = bytearray(data)
            b[at] ^= 1 << rng.randrange(8)
            open(f"{bad}/{name}", "wb").write(b)
            both(f"{name}, byte {at} ({bytes(data[max(at - 20, 0):at + 20])})")
        open(f"{bad}/{name}", "wb").write(data[:-1])
        both(f"{name} cut short")
        open(f"{bad}/{name}", "wb").write(data)
    golden = open(f"{folder}/golden.safetensors", "rb").read()
    open(f"{bad}/golden.safetensors", "wb").write(golden.replace(b"lsa-golden/2", b"lsa-golden/1"))
    assert "another version" in both("version 1")
    assert "another version" in refused(lambda: check(bad, None))
    shutil.rmtree(bad)


def words(folder, golden):
    """One wording: the table in the file is that of EXPORT_FORMAT.md; the checker is small and says the same."""
    table = json.loads(golden["conventions"].tobytes())
    doc = open("export/EXPORT_FORMAT.md").read()
    for name, text, _, _ in table:
        assert f"| `{name}` | " in doc and f"| {text} |" in doc, f"EXPORT_FORMAT.md has no row for {name}: {text}"
    text = open(f"{folder}/check_indexer.py").read()
    assert text == open("export/check_indexer.py").read() and text.count("\n") <= 80
    for dtype in ("f32", "bf16", "fp8"):  # its own arithmetic, and its reading of every weight type
        run("lsa-export", "write", f"{work}/native", "--out", f"{work}/as-{dtype}", "--dtype", dtype)
        p = subprocess.run([sys.executable, f"{work}/as-{dtype}/check_indexer.py"], capture_output=True, text=True)
        assert p.returncode == 0 and p.stdout.count("agrees within") == 3, p.stdout + p.stderr
    return {row[0] for row in table}


try:
    run("lsa-export", "import", "recipes/mini/teacher", "--out", f"{work}/native")
    run("lsa-export", "write", f"{work}/native", "--out", f"{work}/mini-8")
    run("lsa-dump", "synth", "--out", f"{work}/syn", "--docs", "4", "--tokens", "640", "--layers", "4", "--hidden", "96")
    for heads in (32, 128):
        run("lsa-train", "run", "--recipe", "recipes/smoke.yaml", "--data", f"{work}/syn", "--out", f"{work}/run{heads}", "--device", "cpu", "--set", "train.steps=3",
            "--set", "train.eval_every=0", "--set", "sample.val_documents=0", "--set", f"model.heads={heads}", "--set", "model.rank=80", "--set", "optim.lr=3e-2")
        run("lsa-export", "write", f"{work}/run{heads}", "--out", f"{work}/flash-{heads}")
    first, _ = read(f"{work}/mini-8/golden.safetensors")
    known = words(f"{work}/mini-8", first)
    for folder in ("mini-8", "flash-32", "flash-128"):
        run("lsa-export", "verify", f"{work}/{folder}")
        g = judge(f"{work}/{folder}", known)
        selections(f"{work}/{folder}", g, "sum")
    for rule in ("mean", "max"):
        run("lsa-export", "write", f"{work}/native", "--out", f"{work}/{rule}", "--ensemble", rule)
        run("lsa-export", "verify", f"{work}/{rule}")
        selections(f"{work}/{rule}", read(f"{work}/{rule}/golden.safetensors")[0], rule)
    not_named(f"{work}/mini-8", first, known)
    damage(f"{work}/mini-8")
    print("ok")
finally:
    shutil.rmtree(work, ignore_errors=True)
