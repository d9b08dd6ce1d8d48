#!/usr/bin/env python3
"""Gradients of the memory indexer and of its losses by PyTorch autograd in float64.

    python3 tests/oracle/make_indexer_fixtures.py OUT.safetensors

Written from the published description (FlashMemory-DeepSeek-V4, arXiv 2606.09079); shares no code with lsa and never
reads its output. Needs torch, numpy and safetensors; runs on a CPU in seconds. OUT is the fixture of
tests/oracle/test_indexer_grad.c (tests/fixtures/indexer_grad.safetensors), under 1 MB. The traps in it: positions near
1e6, signed head weights, padded candidate lists, a query without candidates, key rows of tiny scale, rows without
positives or without negatives, ties, logits of +-200, hinges at exactly zero, target rows of zeros.
"""
import argparse
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

SEED = 20260609
OUT = {}


def put(name, x, dtype=np.float32):
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().numpy()
    x = np.ascontiguousarray(np.asarray(x).astype(dtype))
    assert name not in OUT, name
    if x.dtype.kind == "f":
        assert np.isfinite(x).all(), name
    OUT[name] = x


def f32(rng, *shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def bf16_values(x):
    """Rounds to bfloat16 and back: hidden vectors are stored so."""
    return torch.tensor(x).to(torch.bfloat16).to(torch.float32).numpy()


# ---- E4M3 keys, by a table of all codes ---------------------------------------------------------------------------
def e4m3_values():
    v = np.zeros(127)
    for c in range(127):
        e, m = c >> 3, c & 7
        v[c] = m / 8 * 2.0 ** -6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
    return v


E4M3 = e4m3_values()


def encode_keys(k):
    """f32 [n, 128] -> u8 [n, 132]: nearest code (ties to the even one) of k / scale, then the scale."""
    out = np.zeros((len(k), 132), np.uint8)
    for i, row in enumerate(k):
        scale = np.float32(max(np.float32(1e-4), np.abs(row).max())) / np.float32(448)
        for j, x in enumerate((row / scale).astype(np.float64)):
            d = np.abs(E4M3 - min(abs(x), 448.0))
            c = int(d.argmin())
            if c + 1 < 127 and d[c + 1] == d[c] and c % 2 == 1:
                c += 1
            out[i, j] = c | (0x80 if x < 0 else 0)
        out[i, 128:] = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
    return out


def decode_keys(rows):
    code = rows[:, :128].astype(np.int64)
    value = np.where(code & 0x80, -1.0, 1.0) * E4M3[code & 0x7F]
    scale = rows[:, 128:].copy().view(np.float32)
    return (value.astype(np.float32) * scale).astype(np.float32)


# ---- the indexer ---------------------------------------------------------------------------------------------------
ROPE = {"dim": 64, "base": 160000.0, "factor": 16.0, "original_len": 65536, "beta_fast": 32.0, "beta_slow": 1.0}


def rope_freqs(r):
    half = r["dim"] // 2
    plain = r["base"] ** (-2.0 * np.arange(half) / r["dim"])

    def turn(beta):
        return r["dim"] * math.log(r["original_len"] / (2 * math.pi * beta)) / (2 * math.log(r["base"]))

    low, high = math.floor(turn(r["beta_fast"])), math.ceil(turn(r["beta_slow"]))
    ramp = np.clip((np.arange(half) - low) / (high - low), 0, 1)
    return (plain * (1 - ramp) + plain / r["factor"] * ramp).astype(np.float32)


def sylvester(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return torch.tensor(h / math.sqrt(n))


def rotate_hadamard(q, position, freq, rope_dim):
    """q float64 [m, heads, d]. The angle is a float32 product, its sine and cosine are exact."""
    d = q.shape[-1]
    angle = (position.astype(np.float32)[:, None] * freq[None, :]).astype(np.float32)
    angle = torch.tensor(angle.astype(np.float64))[:, None, :]
    c, s = torch.cos(angle), torch.sin(angle)
    keep, turn = q[..., : d - rope_dim], q[..., d - rope_dim :]
    x, y = turn[..., 0::2], turn[..., 1::2]
    turned = torch.stack([x * c - y * s, x * s + y * c], dim=-1).flatten(-2)
    return torch.cat([keep, turned], dim=-1) @ sylvester(d)


def rms_norm(x, g, eps):
    return g * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def layer_logits(p, x, position, freq, key, cand, mask, heads, eps):
    """p = (Wa, Wb, g, Ww) float64; key [n_key, 128]; cand row numbers [m, n]. -> z [m, n], 0 where masked."""
    wa, wb, g, ww = p
    u = rms_norm(x @ wa.T, g, eps)
    q = rotate_hadamard((u @ wb.T).reshape(len(x), heads, 128), position, freq, ROPE["dim"])
    w = (x @ ww.T) * (128**-0.5 * heads**-0.5)
    dots = torch.einsum("mnd,mhd->mnh", key[cand], q)
    z = (torch.relu(dots) * w[:, None, :]).sum(-1)
    return torch.where(mask, z, torch.zeros_like(z))


# ---- losses: every one returns a sum, the caller divides -----------------------------------------------------------
def bce_sum(z, y, mask, weight=None, smoothing=0.0, focal=False):
    """Through the logit, in float64; the published code goes through p and floors its logarithms."""
    t = y * (1 - 2 * smoothing) + smoothing
    b = -(t * F.logsigmoid(z) + (1 - t) * F.logsigmoid(-z))
    if focal:
        p, not_p = torch.sigmoid(z), torch.sigmoid(-z)
        b = (p * (1 - t) + not_p * t) ** 2 * b
    if weight is not None:
        b = b * weight
    return torch.where(mask, b, torch.zeros_like(b)).sum(-1)


def pair_sum(z, y, mask, margin=None):
    """Row sums over pairs (positive i, negative j), and the number of pairs."""
    rows, pairs = [], 0
    for i in range(len(z)):
        pos, neg = z[i][mask[i] & (y[i] == 1)], z[i][mask[i] & (y[i] == 0)]
        diff = pos[:, None] - neg[None, :]
        rows.append((-F.logsigmoid(diff) if margin is None else torch.relu(margin - diff)).sum())
        pairs += diff.numel()
    return torch.stack(rows), pairs


def kl_sum(z, target, mask, row_weight=None):
    rows = []
    for i in range(len(z)):
        t = target[i][mask[i]]
        if t.numel() == 0 or float(t.sum()) == 0:
            rows.append(z[i].sum() * 0)
            continue
        ls = F.log_softmax(z[i][mask[i]], dim=0)
        k = (torch.xlogy(t, t) - t * ls).sum()
        rows.append(k if row_weight is None else k * row_weight[i])
    return torch.stack(rows)


def targets_of(rng, n_cand, n, empty_row):
    t = np.zeros((len(n_cand), n), np.float32)
    for i, k in enumerate(n_cand):
        if k and i != empty_row:
            e = rng.exponential(size=k) * (rng.random(k) < 0.6)
            e[0] += 0.1
            t[i, :k] = e / e.sum()
    return t


# ---- cases ---------------------------------------------------------------------------------------------------------
def whole_indexer(name, rng, hidden, heads, rank, layers, losses):
    eps, n, n_key = 1e-6, 12, 64
    position = np.array([63, 12345, 1000003, 65536], np.int64)
    n_cand = np.array([n, 7, 9, 0], np.int32)
    key_base = np.array([0, 16, 30, 5], np.int64)
    m = len(position)
    freq = rope_freqs(ROPE)
    x = bf16_values(f32(rng, m, hidden))
    cand = np.zeros((m, n), np.int32)
    for i in range(m):
        cand[i, : n_cand[i]] = np.sort(rng.choice(n_key - int(key_base[i]), n_cand[i], replace=False))
    mask = torch.tensor(np.arange(n)[None, :] < n_cand[:, None])
    y = (rng.random((m, n)) < 0.4).astype(np.float32)
    vote_weight = np.where(y == 1, 0.5 + 1.5 * rng.integers(0, 19, (m, n)) / 18, 1.0).astype(np.float32)
    target = targets_of(rng, n_cand, n, -1)
    pre = name + "."
    put(pre + "shape", [hidden, heads, rank, layers, m, n, n_key], np.int64)
    for k, v in {"x": x, "freq": freq, "y": y, "vote_weight": vote_weight, "target": target}.items():
        put(pre + k, v)
    put(pre + "position", position, np.int64)
    put(pre + "key_base", key_base, np.int64)
    put(pre + "n_cand", n_cand, np.int32)
    put(pre + "cand", cand, np.int32)

    params, keys = [], []
    for l in range(layers):
        p = [f32(rng, rank, hidden, scale=hidden**-0.5), f32(rng, heads * 128, rank, scale=rank**-0.5),
             (1 + 0.3 * rng.standard_normal(rank)).astype(np.float32), f32(rng, heads, hidden, scale=0.7)]
        raw = f32(rng, n_key, 128) * np.exp(rng.standard_normal((n_key, 1))).astype(np.float32)
        raw[3] *= np.float32(1e-6)  # amax under the floor of the scale
        rows = encode_keys(raw)
        put(f"{pre}keys{l}", rows, np.uint8)
        for part, v in zip(("wq_a", "wq_b", "q_norm", "w_proj"), p):
            put(f"{pre}l{l}.{part}", v)
        params.append([torch.tensor(v.astype(np.float64), requires_grad=True) for v in p])
        keys.append(torch.tensor(decode_keys(rows).astype(np.float64)))

    row_of = torch.tensor(cand.astype(np.int64) + key_base[:, None])

    def logits():
        xs = torch.tensor(x.astype(np.float64))
        return [layer_logits(params[l], xs, position, freq, keys[l], row_of, mask, heads, eps) for l in range(layers)]

    for l, z in enumerate(logits()):
        put(f"{pre}z{l}", z)
    ty, tw, tt = (torch.tensor(v.astype(np.float64)) for v in (y, vote_weight, target))
    count = int(n_cand.sum())
    for loss in losses:
        for p in params:
            for v in p:
                v.grad = None
        zs = logits()
        if loss == "kl_sum":  # the loss of the sum of the layers' logits
            zs, share = [sum(zs)], 1.0
        else:
            share = 1.0 / layers
        total = 0.0
        for z in zs:
            if loss == "bce":
                part, scale = bce_sum(z, ty, mask), 1.0 / count
            elif loss == "bce_votes":
                part, scale = bce_sum(z, ty, mask, weight=tw), 1.0 / count
            elif loss == "focal":
                part, scale = bce_sum(z, ty, mask, focal=True), 1.0 / count
            elif loss == "focal_smooth":
                part, scale = bce_sum(z, ty, mask, smoothing=0.1, focal=True), 1.0 / count
            elif loss in ("bpr", "margin"):
                part, pairs = pair_sum(z, ty, mask, margin=1.0 if loss == "margin" else None)
                scale = 1.0 / max(pairs, 1)
            else:
                part = kl_sum(z, tt, mask)
                scale = 1.0 / int((target.sum(1) > 0).sum())
            total = total + part.sum() * scale * share
        total.backward()
        put(f"{pre}{loss}.scale", [scale * share], np.float64)
        put(f"{pre}{loss}.loss", [float(total)], np.float64)
        for l in range(layers):
            for part, v in zip(("wq_a", "wq_b", "q_norm", "w_proj"), params[l]):
                put(f"{pre}{loss}.l{l}.d_{part}", v.grad)


def losses_alone(rng):
    m, n = 6, 17
    z = f32(rng, m, n, scale=3.0)
    z[0, :8] = [200, -200, 30, -30, 88.5, -88.5, 0, 0]
    z[1, 2], z[1, 3] = z[1, 4], z[1, 4]
    z[3, :] = np.round(z[3, :])  # ties, and hinges at exactly zero
    y = (rng.random((m, n)) < 0.35).astype(np.float32)
    y[0, :8] = [1, 1, 0, 0, 0, 1, 1, 0]
    y[4, :], y[5, :] = 0, 1
    weight = (0.5 + 1.5 * rng.random((m, n))).astype(np.float32)
    n_cand = np.array([n, 9, 0, n, 11, 1], np.int32)
    target, row_weight = targets_of(rng, n_cand, n, 4), np.array([1, 2, 1, 0.25, 3, 0.5], np.float32)
    put("alone.shape", [m, n], np.int64)
    put("alone.n_cand", n_cand, np.int32)
    for k, v in {"z": z, "y": y, "weight": weight, "target": target, "row_weight": row_weight}.items():
        put("alone." + k, v)
    mask = torch.tensor(np.arange(n)[None, :] < n_cand[:, None])
    ty, tw, tt, tr = (torch.tensor(v.astype(np.float64)) for v in (y, weight, target, row_weight))
    scale = 0.125
    cases = {
        "bce": lambda q: bce_sum(q, ty, mask),
        "bce_weight_smooth": lambda q: bce_sum(q, ty, mask, weight=tw, smoothing=0.1),
        "focal": lambda q: bce_sum(q, ty, mask, focal=True),
        "focal_weight_smooth": lambda q: bce_sum(q, ty, mask, weight=tw, smoothing=0.1, focal=True),
        "bpr": lambda q: pair_sum(q, ty, mask)[0],
        "margin": lambda q: pair_sum(q, ty, mask, margin=1.0)[0],
        "kl": lambda q: kl_sum(q, tt, mask),
        "kl_weight": lambda q: kl_sum(q, tt, mask, row_weight=tr),
    }
    put("alone.scale", [scale], np.float64)
    for name, f in cases.items():
        q = torch.tensor(z.astype(np.float64), requires_grad=True)
        rows = f(q) * scale
        rows.sum().backward()
        put(f"alone.{name}.rows", rows, np.float64)
        put(f"alone.{name}.dz", q.grad)


def small_ops(rng):
    m, r, eps = 4, 48, 1e-6
    x, g, dy = f32(rng, m, r, scale=2.0), f32(rng, r), f32(rng, m, r)
    x[2, :] = 0
    tx = torch.tensor(x.astype(np.float64), requires_grad=True)
    tg = torch.tensor(g.astype(np.float64), requires_grad=True)
    out = rms_norm(tx, tg, eps)
    (out * torch.tensor(dy.astype(np.float64))).sum().backward()
    put("norm.shape", [m, r], np.int64)
    for k, v in {"x": x, "g": g, "dy": dy, "y": out, "dx": tx.grad, "dg": tg.grad}.items():
        put("norm." + k, v)
    put("norm.rstd", torch.rsqrt((tx * tx).mean(-1) + eps))

    position = np.array([0, 1, 65537, 1000003], np.int64)
    q, dq = f32(rng, 4, 2, 128), f32(rng, 4, 2, 128)
    tq = torch.tensor(q.astype(np.float64), requires_grad=True)
    out = rotate_hadamard(tq, position, rope_freqs(ROPE), ROPE["dim"])
    (out * torch.tensor(dq.astype(np.float64))).sum().backward()
    put("rope.shape", [4, 2, 128, ROPE["dim"]], np.int64)
    put("rope.position", position, np.int64)
    for k, v in {"freq": rope_freqs(ROPE), "q": q, "out": out, "dout": dq, "dq": tq.grad}.items():
        put("rope." + k, v)

    n, steps = 64, 6
    p0, grads = f32(rng, n), f32(rng, steps, n)
    grads[:, 0] = 0  # never moved but by decay
    grads[:, 1] *= np.float32(1e-7)  # eps matters
    grads[:, 2] *= np.float32(1e4)
    c = {k: float(np.float32(v)) for k, v in {"lr": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "decay": 0.05, "grad_scale": 0.5}.items()}
    p = torch.nn.Parameter(torch.tensor(p0.astype(np.float64)))
    opt = torch.optim.AdamW([p], lr=c["lr"], betas=(c["b1"], c["b2"]), eps=c["eps"], weight_decay=c["decay"])
    put("adamw.shape", [n, steps], np.int64)
    put("adamw.p0", p0)
    put("adamw.g", grads)
    put("adamw.const", [c["lr"], c["b1"], c["b2"], c["eps"], c["decay"], c["grad_scale"]], np.float64)
    for s in range(steps):
        p.grad = torch.tensor(grads[s].astype(np.float64)) * c["grad_scale"]
        opt.step()
        put(f"adamw.p{s + 1}", p)
    put("adamw.m", opt.state[p]["exp_avg"])
    put("adamw.v", opt.state[p]["exp_avg_sq"])


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("out")
    path = a.parse_args().out
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    whole_indexer("wide", rng, hidden=64, heads=8, rank=32, layers=1, losses=["kl"])
    whole_indexer("joint", rng, hidden=32, heads=4, rank=8, layers=2,
                  losses=["bce", "bce_votes", "focal", "focal_smooth", "bpr", "margin", "kl", "kl_sum"])
    losses_alone(rng)
    small_ops(rng)
    size = sum(v.nbytes for v in OUT.values())
    assert size < 1_000_000, size
    save_file(OUT, path, metadata={"seed": str(SEED), "torch": torch.__version__, "numpy": np.__version__, "rope": json.dumps(ROPE)})
    print(f"{path}: {len(OUT)} tensors, {size} bytes")


if __name__ == "__main__":
    main()
