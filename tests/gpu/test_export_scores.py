#!/usr/bin/env python3
"""An implementation of the indexer in PyTorch, from notes of FlashMemory 5.1 to 5.3 alone, against lsa both ways: it gives the golden vectors' numbers on
their random inputs; and golden vectors that it makes itself, of hidden vectors and keys that the mini teacher produced, are accepted by `lsa-export
verify`, whose kernels replay them. On a GPU if there is one. Skipped (77) where torch or h5py is not installed."""
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zlib

try:
    import h5py
    import numpy as np
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file
except ImportError as e:
    print(f"skipped: {e}")
    sys.exit(1 if "torch" in os.environ.get("LSA_REQUIRE", "") else 77)

BIN = os.environ["LSA_BIN"]
TEACHER, TOKENS, NEEDS = "recipes/mini/teacher", "recipes/mini/val.u16", "recipes/mini/val.jsonl"
LIMIT = 1e-5  # relative, f32
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cuda.matmul.allow_tf32 = False
work = tempfile.mkdtemp(prefix="lsa-scores-")


def run(program, *args, code=0):
    p = subprocess.run([f"{BIN}/{program}", *args], capture_output=True, text=True)
    if p.returncode != code:
        sys.exit(f"{program} {' '.join(args)}: exit {p.returncode}, expected {code}\n{p.stdout}{p.stderr}")
    return p.stdout


def load(path):
    with safe_open(path, "pt", device=device) as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def frequencies(r):
    """The rotary table of 5.2 in fp32."""
    half = r["dim"] // 2
    i = torch.arange(half, dtype=torch.float32)
    f = 1.0 / (r["base"] ** (2 * i.double() / r["dim"])).float()
    if r["factor"] == 1:
        return f.to(device)
    at = [r["dim"] * math.log(r["original_len"] / (2 * math.pi * b)) / (2 * math.log(r["base"])) for b in (r["beta_fast"], r["beta_slow"])]
    low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), r["dim"] - 1)
    ramp = ((i.double() - low) / (high - low)).clamp(0, 1).float()
    return (f / r["factor"] * ramp + f * (1 - ramp)).to(device)


class Indexer:
    def __init__(self, folder):
        self.w, meta = load(f"{folder}/indexer.safetensors")
        self.geo = json.loads(meta["lsa.geometry"])
        self.ordinals = [x["ordinal"] for x in self.geo["layers"]]
        self.freq = frequencies(self.geo["rope"])
        h = torch.ones(1, 1)
        while len(h) < 128:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        self.hadamard = (h / math.sqrt(128)).to(device)

    def turn(self, q, position):
        """RoPE on the last channels, adjacent pairs; the angle is an fp32 product, its sine and cosine are accurate."""
        dim = self.geo["rope"]["dim"]
        angle = (position.float()[:, None] * self.freq).double()
        turned = torch.view_as_complex(q[..., 128 - dim :].float().reshape(*q.shape[:-1], dim // 2, 2).contiguous())
        turned = turned * torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None]
        return torch.cat([q[..., : 128 - dim].float(), torch.view_as_real(turned).flatten(-2)], -1)

    def stages(self, o, x, position, rows):
        wa, wb, g, ww = (self.w[f"retrievers.l{o}.{n}"] for n in ("wq_a.weight", "wq_b.weight", "q_norm_weight", "weights_proj.weight"))
        heads, x, s = len(ww), x.float(), {}
        s["a"] = x @ wa.T
        s["u"] = g * s["a"] * torch.rsqrt(s["a"].square().mean(-1, keepdim=True) + self.geo["eps"])
        s["raw"] = (s["u"] @ wb.T).view(len(x), heads, 128)
        s["rope"] = self.turn(s["raw"], position)
        s["q"] = s["rope"] @ self.hadamard
        s["w"] = x @ ww.T * 128**-0.5 * heads**-0.5
        k = rows[:, :128].contiguous().view(torch.float8_e4m3fn).float() * rows[:, 128:].contiguous().view(torch.float32)

        def logits(q, w):
            return torch.einsum("mh,mhn->mn", w, torch.relu(torch.einsum("mhd,nd->mhn", q, k)))

        s["logit"] = logits(s["q"], s["w"])
        s["bf16.raw"] = s["raw"].bfloat16()
        s["bf16.rope"] = self.turn(s["bf16.raw"], position).bfloat16()
        s["bf16.q"] = s["bf16.rope"].float() @ self.hadamard
        s["bf16.logit"] = logits(s["bf16.q"], s["w"])
        s["fp8.scale"] = s["bf16.q"].abs().amax(-1).clamp(min=1e-4) / 448
        code = (s["bf16.q"] / s["fp8.scale"][..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        s["fp8.code"] = code.view(torch.uint8)
        s["fp8.w"] = s["w"] * s["fp8.scale"]
        s["fp8.logit"] = sum(logits(code.float()[:, h : h + 64], s["fp8.w"][:, h : h + 64]) for h in range(0, heads, 64))
        return s


def difference(got, want):
    """The largest relative difference of a query; infinite if a number is not finite."""
    got, want = got.double().flatten(1), want.double().flatten(1)
    d = ((got - want).norm(dim=1) / want.norm(dim=1)).max().item()
    return d if math.isfinite(d) else math.inf


def random_inputs(folder):
    g, _ = load(f"{folder}/golden.safetensors")
    m = Indexer(folder)
    worst = {}
    for o in m.ordinals:
        s = m.stages(o, g[f"l{o}.hidden"], g["position"], g[f"l{o}.key"])
        for name, limit in (("logit", LIMIT), ("bf16.logit", 1e-3), ("fp8.logit", 1e-2)):
            d = difference(s[name], g[f"l{o}.{name}"])
            element = ((s[name] - g[f"l{o}.{name}"]).abs() / g[f"l{o}.{name}"].square().mean(1, keepdim=True).sqrt()).max().item()
            assert max(d, element) <= limit, (o, name, d, element)
            worst[name] = max(worst.get(name, 0), d, element)
    print(f"{os.path.basename(folder)}: random inputs on {device}: " + ", ".join(f"{k} within {v:.1e}" for k, v in worst.items()))


def teacher_golden(folder, hidden, keys, position):
    """Replaces folder's golden vectors by PyTorch's, of these inputs: hidden, keys {ordinal: [4, d], [48, 132]}."""
    old, meta = load(f"{folder}/golden.safetensors")
    m = Indexer(folder)
    new = {k: old[k].clone() for k in ("freq", "rank_index", "head_index", "threshold", "conventions")}
    new["position"] = position
    total = {}
    for o in m.ordinals:
        new[f"l{o}.hidden"], new[f"l{o}.key"] = hidden[o], keys[o]
        for name, v in m.stages(o, hidden[o], position, keys[o]).items():
            if name in ("a", "u"):
                v = v[:, new["rank_index"].long()]
            elif v.dim() == 3:
                v = v[:, new["head_index"].long()]
            new[f"l{o}.{name}"] = v.contiguous()
            if name.endswith("logit"):
                path = name.split(".")[0] if "." in name else "f32"
                total[path] = total.get(path, 0) + v.double()
    for path, score in total.items():
        score = score.float()
        k = (score > score[:, 11:12]).sum(1) + 1  # of the equal keys 11 and 37 the first
        order = torch.sort(score, dim=1, descending=True, stable=True).indices
        top = torch.zeros_like(score, dtype=torch.uint8)
        for i in range(len(score)):
            top[i, order[i, : k[i]]] = 1
        new |= {f"{path}.score": score, f"{path}.k": k.int(), f"{path}.top": top, f"{path}.above": (score > new["threshold"]).to(torch.uint8)}
    assert sorted(new) == sorted(old), set(new) ^ set(old)
    path = f"{folder}/golden.safetensors"
    save_file({k: v.cpu() for k, v in new.items()}, path, dict(meta, file_crc32="00000000"))
    raw = open(path, "rb").read()
    open(path, "wb").write(raw.replace(b'"file_crc32":"00000000"', b'"file_crc32":"%08x"' % zlib.crc32(raw), 1))


def teacher_inputs(folder, shards):
    info = json.load(open(f"{shards}/manifest.json"))
    rng = np.random.default_rng(5)
    worst = 0
    with h5py.File(f"{shards}/{info['shards'][0]['file']}") as f:
        position, at = f["rows/position"][:], f["hidden/row"][:]
        for _ in range(6):
            rows = np.sort(rng.choice(len(at), 4, replace=False))
            hidden, keys = {}, {}
            for o in range(len(info["layers"])):
                bits = f[f"hidden/c{o}"][:][rows].astype(np.int32)
                hidden[o] = torch.tensor(bits << 16).view(torch.float32).bfloat16().to(device)
                k = f[f"keys/c{o}"][:][np.random.default_rng(9).choice(f[f"keys/c{o}"].shape[0], 48, replace=False)]
                k[37] = k[11]
                k[23, :128] = 0
                keys[o] = torch.tensor(k).to(device)
            shutil.rmtree(f"{work}/one", ignore_errors=True)
            shutil.copytree(folder, f"{work}/one")
            teacher_golden(f"{work}/one", hidden, keys, torch.tensor(position[at[rows]]).to(device))
            said = json.loads(run("lsa-export", "verify", f"{work}/one", "--json"))
            assert said["ok"] and said["worst_relative"] <= LIMIT, said
            worst = max(worst, said["worst_relative"])
    # and a torch golden with a wrong number is refused
    with open(f"{work}/one/golden.safetensors", "r+b") as f:
        f.seek(-100, 2)
        b = f.read(1)
        f.seek(-100, 2)
        f.write(bytes([b[0] ^ 1]))
    run("lsa-export", "verify", f"{work}/one", code=3)
    print(f"{os.path.basename(folder)}: mini-teacher inputs: lsa's kernels replay PyTorch's golden vectors within {worst:.1e} (f32)")


try:
    run("lsa-export", "import", TEACHER, "--out", f"{work}/native")
    run("lsa-export", "write", f"{work}/native", "--out", f"{work}/mini")
    run("lsa-dump", "run", "--teacher", TEACHER, "--tokens", TOKENS, "--needs", NEEDS, "--documents", "0:1", "--out", f"{work}/shards")
    run("lsa-train", "run", "--recipe", "recipes/mini-cpu.yaml", "--data", f"{work}/shards", "--out", f"{work}/run", "--device", "cpu", "--set", "train.steps=5", "--set", "model.continuation=0",
        "--set", "train.eval_every=0", "--set", "sample.val_documents=0", "--set", "model.heads=128")
    run("lsa-export", "write", f"{work}/run", "--out", f"{work}/trained-128")
    for name in ("mini", "trained-128"):
        random_inputs(f"{work}/{name}")
        teacher_inputs(f"{work}/{name}", f"{work}/shards")
    print("ok")
finally:
    shutil.rmtree(work, ignore_errors=True)
