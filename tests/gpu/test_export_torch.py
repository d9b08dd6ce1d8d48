#!/usr/bin/env python3
"""PyTorch itself on an export: torch.load(weights_only=True) reads indexer.pt in every weight type, with and without tables, also mapped, and its
values are those of indexer.safetensors; what torch.save writes is imported; and the reference's scoring in PyTorch gives the golden logits.
Skipped (77) where torch is not installed. On a GPU if there is one."""
import json
import os
import subprocess
import sys
import tempfile

try:
    import torch
    from safetensors import safe_open
except ImportError as e:
    print(f"skipped: {e}")
    sys.exit(1 if "torch" in os.environ.get("LSA_REQUIRE", "") else 77)

BIN = os.environ["LSA_BIN"]
TEACHER = "recipes/mini/teacher"
device = "cuda" if torch.cuda.is_available() else "cpu"
work = tempfile.TemporaryDirectory(prefix="lsa-torch-")
W = work.name


def run(*args, ok=True):
    p = subprocess.run([f"{BIN}/lsa-export", *args], capture_output=True, text=True)
    if ok and p.returncode:
        sys.exit(f"lsa-export {' '.join(args)}: exit {p.returncode}\n{p.stderr}")
    return p


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def weights(folder):
    """name -> f32 tensor of indexer.safetensors, whatever its weight type."""
    with safe_open(f"{folder}/indexer.safetensors", "pt") as f:
        t = {k: f.get_tensor(k) for k in f.keys()}
        meta = f.metadata()
    return {k: v.float() * t[k + "_scale"] if k + "_scale" in t else v.float() for k, v in t.items() if not k.endswith("_scale")}, meta


def load(path):
    """The flat dict, the same read whole and mapped."""
    whole = torch.load(path, weights_only=True)
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert list(whole) == list(mapped) and all(same(whole[k], mapped[k]) for k in whole)
    assert all(v.is_contiguous() for v in whole.values())
    return whole


def archives():
    run("import", TEACHER, "--out", f"{W}/native")
    for dtype in ("f32", "bf16", "fp8"):
        for options in (["--pt"], ["--pt-freqs", "5000"]):
            d = f"{W}/{dtype}{len(options)}"
            run("write", f"{W}/native", "--out", d, "--dtype", dtype, "--per-layer", *options)
            state, (want, meta) = load(f"{d}/indexer.pt"), weights(d)
            tables = [k for k in state if k.endswith("freqs_cis")]
            assert sorted(set(state) - set(tables)) == sorted(want)
            assert all(same(state[k].float(), want[k]) for k in want), dtype
            assert all(state[k].dtype == (torch.float32 if dtype == "f32" or "q_norm" in k else torch.bfloat16) for k in want)
            assert len(tables) == (3 if len(options) == 2 else 0)
            with safe_open(f"{d}/golden.safetensors", "pt") as f:
                freq = f.get_tensor("freq")
            angle = torch.outer(torch.arange(5000, dtype=torch.float32), freq)
            for k in tables:
                assert state[k].shape == (5000, 32) and state[k].dtype == torch.complex64
                assert (state[k] - torch.polar(torch.ones_like(angle), angle)).abs().max() < 1e-6
            for layer in json.loads(meta["lsa.geometry"])["layers"]:
                with safe_open(f"{d}/layer_{layer['id']:02d}.safetensors", "pt") as f:
                    for k in f.keys():
                        if not k.endswith("_scale"):
                            one = f.get_tensor(k).float()
                            one = one * f.get_tensor(k + "_scale") if k + "_scale" in f.keys() else one
                            assert same(one, want[f"retrievers.l{layer['ordinal']}.{k}"])
    print(f"torch {torch.__version__}: indexer.pt in f32, bf16, fp8, with and without tables, whole and mapped")


class Scorer(torch.nn.Module):
    """One layer as the reference computes it, in fp32 from the description."""

    def __init__(self, rank, heads, hidden, positions, freq):
        super().__init__()
        self.wq_a = torch.nn.Linear(hidden, rank, bias=False)
        self.wq_b = torch.nn.Linear(rank, heads * 128, bias=False)
        self.q_norm_weight = torch.nn.Parameter(torch.ones(rank))
        self.weights_proj = torch.nn.Linear(hidden, heads, bias=False)
        angle = torch.outer(torch.arange(positions, dtype=torch.float32), freq)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angle), angle))

    def forward(self, x, position, keys):
        heads = self.weights_proj.out_features
        a = self.wq_a(x)
        u = self.q_norm_weight * a * torch.rsqrt(a.square().mean(-1, keepdim=True) + 1e-6)
        q = self.wq_b(u).view(len(x), heads, 128)
        turned = torch.view_as_complex(q[..., 64:].reshape(len(x), heads, 32, 2)) * self.freqs_cis[position][:, None]
        q = torch.cat([q[..., :64], torch.view_as_real(turned).flatten(-2)], -1)
        h = torch.ones(1, 1, device=x.device)
        while len(h) < 128:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
        q = q @ h / 128**0.5
        w = self.weights_proj(x) * 128**-0.5 * heads**-0.5
        k = keys[:, :128].contiguous().view(torch.float8_e4m3fn).float() * keys[:, 128:].contiguous().view(torch.float32)
        return torch.einsum("mh,mhs->ms", w, torch.einsum("mhd,sd->mhs", q, k).relu())


def scoring():
    """The archive's tables and weights, loaded strictly into modules, score as the golden vectors say."""
    torch.backends.cuda.matmul.allow_tf32 = False
    d = f"{W}/score"
    run("write", f"{W}/native", "--out", d, "--pt-freqs", "70000")
    state = load(f"{d}/indexer.pt")
    with safe_open(f"{d}/golden.safetensors", "pt") as f:
        g = {k: f.get_tensor(k).to(device) for k in f.keys()}
    near = g["position"] < 70000
    worst = 0
    for o in range(3):
        part = {k.split(".", 2)[2]: v for k, v in state.items() if k.startswith(f"retrievers.l{o}.")}
        m = Scorer(*part["wq_a.weight"].shape[:1], part["weights_proj.weight"].shape[0], part["wq_a.weight"].shape[1], 70000, g["freq"].cpu())
        m.load_state_dict(part, strict=True)
        with torch.no_grad():
            z = m.to(device)(g[f"l{o}.hidden"].float(), g["position"].clamp(max=69999), g[f"l{o}.key"])
        want = g[f"l{o}.logit"]
        worst = max(worst, ((z - want)[near].abs().max() / want[near].square().mean().sqrt()).item())
    print(f"reference scoring in PyTorch on {device}: logits within {worst:.2g} of rms")
    assert worst < 1e-5


def saved_by_torch():
    """What torch.save writes comes in as it was: a joint state dict with buffers, an epoch checkpoint, half precision."""
    freq = torch.ones(32)
    joint = torch.nn.ModuleDict({"retrievers": torch.nn.ModuleDict({f"l{o}": Scorer(16, 4, 4096, 100, freq) for o in (10, 20)})})
    state = joint.state_dict()
    optimizer = torch.optim.AdamW(joint.parameters(), lr=1e-4)
    sum(p.sum() for p in joint.parameters()).backward()
    optimizer.step()
    torch.save(joint.state_dict(), f"{W}/joint.pt")
    torch.save({"epoch": 1, "model_state": joint.state_dict(), "optimizer": optimizer.state_dict(), "avg_loss": 0.5, "args": {"lr": 1e-4}}, f"{W}/epoch.pt")
    torch.save({k: v.bfloat16() for k, v in state.items() if not k.endswith("freqs_cis")}, f"{W}/half.pt")
    for name in ("joint", "epoch", "half"):
        run("import", f"{W}/{name}.pt", "--out", f"{W}/in-{name}")
        run("write", f"{W}/in-{name}", "--out", f"{W}/out-{name}")
        got, _ = weights(f"{W}/out-{name}")
        want = {k: v.bfloat16().float() if name == "half" else v for k, v in joint.state_dict().items() if not k.endswith("freqs_cis")}
        if name == "half":
            want = {k: v.float() for k, v in torch.load(f"{W}/half.pt", weights_only=True).items()}
        assert sorted(got) == sorted(want) and all(same(got[k], want[k].detach()) for k in want), name
    torch.save(joint, f"{W}/module.pt")
    p = run("import", f"{W}/module.pt", "--out", f"{W}/in-module", ok=False)
    assert p.returncode == 3 and "torch.nn" in p.stderr, p.stderr
    torch.save(state, f"{W}/legacy.pt", _use_new_zipfile_serialization=False)
    p = run("import", f"{W}/legacy.pt", "--out", f"{W}/in-legacy", ok=False)
    assert p.returncode == 3 and "old format" in p.stderr, p.stderr
    print("torch.save: joint, epoch and half checkpoints imported; a pickled module and the old format refused")


archives()
scoring()
saved_by_torch()
print("ok")
