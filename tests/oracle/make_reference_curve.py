#!/usr/bin/env python3
"""Replays traced training runs in PyTorch, float32, and writes the loss of every step.

    python3 tests/oracle/make_reference_curve.py TRACEDIR OUT.json [--device cpu]

TRACEDIR comes from make_trace.sh. Shares no code with lsa: model, losses and schedule are written from the published
description (FlashMemory-DeepSeek-V4, arXiv 2606.09079), AdamW, gradient clipping and the cosine are torch's own.
Needs torch, numpy and safetensors. OUT.json is the fixture of tests/oracle/test_reference_curve.py.
"""
import argparse
import glob
import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file


def rope_freqs(r):
    dim, base = r["dim"], r["base"]
    i = np.arange(dim // 2, dtype=np.float64)
    plain = base ** (-2.0 * i / dim)
    if r["factor"] == 1:
        return torch.tensor(plain, dtype=torch.float32)

    def turn(beta):
        return dim * math.log(r["original_len"] / (2 * math.pi * beta)) / (2 * math.log(base))

    low, high = max(math.floor(turn(r["beta_fast"])), 0), min(math.ceil(turn(r["beta_slow"])), dim - 1)
    ramp = np.clip((i - low) / max(high - low, 0.001), 0, 1)
    return torch.tensor(plain * (1 - ramp) + plain / r["factor"] * ramp, dtype=torch.float32)


def sylvester(n):
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


def decode_keys(rows):
    """u8 [n, 132] -> f32 [n, 128]: E4M3 codes times one scale a row."""
    codes = torch.tensor(rows[:, :128].copy()).view(torch.float8_e4m3fn).to(torch.float32)
    scale = torch.tensor(rows[:, 128:].copy().view("<f4").astype(np.float32))
    return codes * scale


class Layer(torch.nn.Module):
    def __init__(self, t, ordinal, g):
        super().__init__()
        p = f"retrievers.l{ordinal}."
        self.wq_a = torch.nn.Parameter(torch.tensor(t[p + "wq_a.weight"]))
        self.wq_b = torch.nn.Parameter(torch.tensor(t[p + "wq_b.weight"]))
        self.norm = torch.nn.Parameter(torch.tensor(t[p + "q_norm_weight"]))
        self.w_proj = torch.nn.Parameter(torch.tensor(t[p + "weights_proj.weight"]))
        self.heads, self.rope_dim, self.eps = g["n_head"], g["rope"]["dim"], g["eps"]
        self.register_buffer("freq", rope_freqs(g["rope"]))
        self.register_buffer("had", (sylvester(128) / math.sqrt(128.0)).to(torch.float32))

    def forward(self, x, pos, keys):
        """x [m,d], pos [m], keys [m,n,128] -> logits [m,n]."""
        a = x @ self.wq_a.T
        u = self.norm * a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + self.eps)
        q = (u @ self.wq_b.T).view(x.shape[0], self.heads, 128)
        angle = (pos.to(torch.float32)[:, None] * self.freq[None, :])[:, None, :]  # rounded to float32 before sin and cos
        cos, sin = angle.double().cos().float(), angle.double().sin().float()
        keep, turn = q[..., :128 - self.rope_dim], q[..., 128 - self.rope_dim:]
        even, odd = turn[..., 0::2], turn[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        q = torch.cat([keep, turned], -1) @ self.had
        w = (x @ self.w_proj.T) * (128.0 ** -0.5 * self.heads ** -0.5)
        return torch.einsum("mhn,mh->mn", torch.relu(torch.einsum("mhd,mnd->mhn", q, keys)), w)


def loss_of(z, y, weight, valid, r):
    kind = r["loss.kind"]
    if kind == "kl":
        rows = y.sum(-1) > 0
        log_p = torch.log_softmax(z.masked_fill(~valid, float("-inf")), -1)
        part = torch.where(y > 0, y * (torch.log(torch.where(y > 0, y, torch.ones_like(y))) - log_p), torch.zeros_like(y))
        return part.sum() / max(int(rows.sum()), 1)
    if kind in ("bce", "focal"):
        eps = float(r["loss.smoothing"])
        z, y, weight = z[valid], y[valid], weight[valid]
        t = y * (1 - 2 * eps) + eps
        bce = -(t * F.logsigmoid(z).clamp(min=-100) + (1 - t) * F.logsigmoid(-z).clamp(min=-100))
        if kind == "focal":
            p = torch.sigmoid(z)
            bce = (1 - (p * t + (1 - p) * (1 - t))).pow(2) * bce
        return (weight * bce).sum() / z.numel()
    total, pairs = z.new_zeros(()), 0
    for i in range(z.shape[0]):
        pos, neg = z[i][valid[i] & (y[i] > 0.5)], z[i][valid[i] & (y[i] < 0.5)]
        diff = pos[:, None] - neg[None, :]
        each = -F.logsigmoid(diff) if kind == "bpr" else torch.relu(float(r["loss.margin"]) - diff)
        total, pairs = total + each.sum(), pairs + diff.numel()
    return total / max(pairs, 1)


def learning_rates(r, steps):
    """Rate of each step; the reference's cosine comes from torch, the warm-up of our own recipes is linear."""
    peak, low, warm = float(r["optim.lr"]), float(r["optim.min_lr"]), int(r["optim.warmup"])
    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(dummy, T_max=max(steps - warm, 1), eta_min=low)
    out = []
    for s in range(steps):
        if s < warm:
            out.append(peak * (s + 1) / warm)
            continue
        out.append(peak if r["optim.schedule"] == "constant" else dummy.param_groups[0]["lr"])
        dummy.step()
        cosine.step()
    return out


def replay(path, device):
    t = load_file(path)
    meta = json.load(open(path.replace(".safetensors", ".json")))
    r, g = meta["recipe"], meta["geometry"]
    layers = torch.nn.ModuleList(Layer(t, l["ordinal"], g) for l in g["layers"]).to(device)
    n_layer = len(layers)
    gains = [l.norm for l in layers]
    rest = [p for l in layers for p in (l.wq_a, l.wq_b, l.w_proj)]
    wd = float(r["optim.weight_decay"])
    opt = torch.optim.AdamW([{"params": rest, "weight_decay": wd},
                             {"params": gains, "weight_decay": wd if r["optim.decay_norm"] == "true" else 0.0}],
                            lr=float(r["optim.lr"]), betas=(float(r["optim.beta1"]), float(r["optim.beta2"])), eps=float(r["optim.eps"]))
    keys = {}
    for name, rows in t.items():
        if name.startswith("keys."):
            _, doc, l = name.split(".")
            keys[int(doc), int(l)] = decode_keys(rows).to(device)
    losses = []
    for s, lr in enumerate(learning_rates(r, meta["steps"])):
        n_cand, pos, doc = (t[f"{s}.{k}"] for k in ("n_cand", "position", "doc"))
        y = torch.tensor(t[f"{s}.y"]).to(device)
        weight = torch.tensor(t[f"{s}.weight"]).to(device) if f"{s}.weight" in t else torch.ones_like(y)
        m, n = y.shape
        valid = torch.arange(n)[None, :] < torch.tensor(n_cand.astype(np.int64))[:, None]
        chunk = torch.tensor(t[f"{s}.cand"].astype(np.int64)) if f"{s}.cand" in t else torch.arange(n)[None, :].repeat(m, 1)
        chunk = torch.where(valid, chunk, torch.zeros_like(chunk))
        valid = valid.to(device)
        logits = []
        for l, layer in enumerate(layers):
            k = torch.stack([keys[int(doc[i]), l][chunk[i].clamp(max=keys[int(doc[i]), l].shape[0] - 1).to(device)] for i in range(m)])
            logits.append(layer(torch.tensor(t[f"{s}.x.{l}"]).to(device), torch.tensor(pos).to(device), k))
        if r["loss.on"] == "sum":
            loss = loss_of(sum(logits), y, weight, valid, r)
        else:
            loss = sum(loss_of(z, y, weight, valid, r) for z in logits) / n_layer
        opt.zero_grad()
        loss.backward()
        if float(r["optim.clip"]) > 0:
            torch.nn.utils.clip_grad_norm_(layers.parameters(), float(r["optim.clip"]))
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step()
        losses.append(float(loss.detach()))
    ours = t["loss"]
    worst = float(np.max(np.abs(ours - np.array(losses)) / np.maximum(np.abs(np.array(losses)), 1e-12)))
    print(f"{os.path.basename(path)}: {len(losses)} steps, loss {losses[0]:.6f} -> {losses[-1]:.6f}, largest relative difference from the trace {worst:.2e}")
    return {"steps": meta["steps"], "samples_sha256": meta["samples_sha256"], "loss": losses, "worst_rel_when_made": worst}


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("traces")
    a.add_argument("out")
    a.add_argument("--device", default="cpu")
    a = a.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    paths = sorted(glob.glob(os.path.join(a.traces, "*.safetensors")))
    if not paths:
        raise SystemExit(f"no traces in {a.traces}; run tests/oracle/make_trace.sh first")
    cases = {os.path.basename(p)[:-len(".safetensors")]: replay(p, a.device) for p in paths}
    with open(a.out, "w") as f:
        json.dump({"torch": torch.__version__, "cases": cases}, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    main()
