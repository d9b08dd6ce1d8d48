#!/usr/bin/env python3
"""How a training step would scale from 1 to 1,024 GPUs: a simulation, with its assumptions in SCALING.md.

    recipes/scaling_model.py [--plot recipes/scaling_model.svg] [--table] [options]

prints one JSON line for each point (or --table: the table of SCALING.md). Needs numpy alone. A step is simulated event by event for every GPU, as
kernels/cuda/step/ranks.cu orders it: its stages, slowed by its own seeded noise; the gradients of wq_b, exchanged from when the last GPU has formed
them, beside the rest of the backward pass; those of the other tensors after both; a slice of the norm on each GPU, which all wait for; AdamW, with
ZeRO-1 of slices, whose bf16 weights are then gathered. GPUs begin their next step as soon as they can, without a barrier."""
import argparse
import json
import math
from dataclasses import dataclass, replace

import numpy as np

# Measured: kernels/PERF.md, 2026-11-25, one H100; ms at 256 and at 1,024 windows, 8 layers, 128 heads, rank 2048, hidden 4096, 2,048 candidates.
STAGES = {"samples": (0.115, 0.416), "hidden": (0.011, 0.042), "forward": (0.341, 1.061), "scores": (0.772, 2.990),
          "weights": (0.804, 1.946), "norm": (0.450, 0.450), "adamw": (3.55, 3.55)}
LAYERS, HEADS, RANK, HIDDEN, CANDIDATES = 8, 128, 2048, 4096, 2048
WQ_B = LAYERS * 128 * HEADS * RANK
PARAMETERS = LAYERS * (RANK * HIDDEN + 128 * HEADS * RANK + RANK + HEADS * HIDDEN)
MEASURED_STEPS = [("sampled", 64, 5.247), ("sampled", 256, 6.009), ("sampled", 1024, 10.340), ("full", 256, 17.60)]  # windows, ms
# recipes/scaling.sh, 2026-11-25, two H100s, weights gathered after the update (since then beside the next sampling, which the simulation
# leaves out: 9.978 ms instead of 10.427): windows a GPU, ZeRO-1, bytes of a gradient's element, beside the backward pass, ms
MEASURED_TWO = [(1024, True, 2, True, 10.427), (1024, True, 4, True, 12.157), (1024, False, 2, True, 11.781), (1024, False, 4, True, 14.465),
                (1024, True, 2, False, 10.643), (256, True, 2, True, 6.246), (256, True, 4, True, 8.015), (256, False, 2, True, 7.602)]


@dataclass(frozen=True)
class Machine:
    """Assumed, unless it says measured; 1e30 for infinite."""
    per_node: int = 8
    nvlink: float = 260.0  # GB/s and direction of a GPU in its node: measured on two H100s, 235 to 320 by operation
    hidden: float = 0.5    # of what runs beside the backward pass, which slows it: measured on two H100s, 0.3 to 0.6
    net: float = 320.0     # GB/s and direction of a node: 0.8 of eight cards of 50
    base: float = 8.4      # us, NCCL's tuning table (src/graph/tuning.cc at 01afd20), Simple: a ring collective,
    ring_nvlink: float = 3.4   # a ring's step inside a node
    ring_net: float = 9.6      # and between nodes,
    tree_nvlink: float = 28.0  # a tree's chunk down the chain of a node
    tree_net: float = 50.0     # and across the tree of nodes
    jitter: float = 0.01   # each GPU and step: half-normal slowdown with this scale
    slow_share: float = 0.005  # of GPUs that are always slower,
    slow_by: float = 0.05      # by this much


@dataclass(frozen=True)
class Job:
    windows: int = 256  # a GPU and step
    candidates: int = CANDIDATES
    zero1: bool = False
    wire: int = 4  # bytes of a gradient's element: optim.exchange f32 or bf16
    overlap: bool = True  # False: exchanges begin when the backward pass is done
    algorithm: str = "best"  # of sums on every GPU: ring, tree, or the faster; NCCL has no tree for slices


def stage_ms(job):
    """Stages of one GPU's step: a straight line in the windows; scores also go with the candidates."""
    out = {}
    for name, (a, b) in STAGES.items():
        slope = (b - a) / (1024 - 256)
        work = job.candidates / CANDIDATES if name in ("scores", "samples") else 1.0
        out[name] = max(0.0, a - 256 * slope) + slope * job.windows * work
    if job.candidates > CANDIDATES:
        out["samples"] = 0.0  # all candidates: nothing is drawn
    return out


def nodes_of(gpus, m):
    return max(1, math.ceil(gpus / m.per_node))


def ring_ms(n_bytes, gpus, m, passes):
    if gpus == 1:
        return 0.0
    nodes = nodes_of(gpus, m)
    rate = m.nvlink if nodes == 1 else (min(m.nvlink, m.net) if gpus > nodes else m.net)
    steps = (gpus - nodes) * m.ring_nvlink + (nodes - 1) * m.ring_net
    return 1e-3 * (m.base + passes * steps) + 1e-6 * passes * (gpus - 1) / gpus * n_bytes / rate


def tree_ms(n_bytes, gpus, m):
    """Double binary tree of nodes over chains of GPUs: every link carries all bytes up and all bytes down."""
    if gpus == 1:
        return 0.0
    nodes = nodes_of(gpus, m)
    rate = m.nvlink if nodes == 1 else (min(m.nvlink, m.net) if gpus > nodes else m.net)
    hops = (gpus // nodes - 1) * m.tree_nvlink + math.ceil(math.log2(nodes)) * m.tree_net
    return 2 * (1e-3 * hops + 1e-6 * n_bytes / rate)


def sum_ms(n, job, gpus, m):
    if job.zero1:
        return ring_ms(job.wire * n, gpus, m, 1)
    both = {"ring": ring_ms(job.wire * n, gpus, m, 2), "tree": tree_ms(job.wire * n, gpus, m)}
    return min(both.values()) if job.algorithm == "best" else both[job.algorithm]


def wq_b_formed_ms(job):
    """When the gradients of wq_b are formed, in the stage of the weight gradients: their share of what it writes and computes."""
    s = (STAGES["weights"][1] - STAGES["weights"][0]) / (1024 - 256)
    start = STAGES["weights"][0] - 256 * s
    return start * WQ_B / PARAMETERS + job.windows * s * 2 * WQ_B / (2 * PARAMETERS + 2 * WQ_B)


def slowdowns(gpus, steps, m, seed):
    rng = np.random.default_rng([seed, gpus])
    slow = np.where(rng.random(gpus) < m.slow_share, m.slow_by, 0.0)
    return 1.0 + slow + m.jitter * np.abs(rng.standard_normal((steps, gpus)))


def simulate(job, gpus, m, steps=50, seed=1):
    """ms a step, and what the average GPU computes in it: the rest is communication that nothing hides and waiting for others."""
    s = stage_ms(job)
    before = s["samples"] + s["hidden"] + s["forward"] + s["scores"]
    first, second = sum_ms(WQ_B, job, gpus, m), sum_ms(PARAMETERS - WQ_B, job, gpus, m)
    gather = ring_ms(2 * PARAMETERS, gpus, m, 1) if job.zero1 else 0.0
    several = gpus > 1
    norm = s["norm"] * job.wire / 4 / gpus if several else s["norm"]
    adamw = s["adamw"] * (1 - (4 - job.wire) / 30) / (gpus if job.zero1 else 1) if several else s["adamw"]
    formed = wq_b_formed_ms(job) if job.overlap else s["weights"]
    clock = np.zeros(gpus)
    own = np.zeros(gpus)
    for f in slowdowns(gpus, steps, m, seed):
        backward = clock + f * (before + s["weights"])
        if several:
            start = (clock + f * (before + formed)).max()
            both = max(0.0, min(start + first, backward.max()) - start)
            summed = max(start + first, backward.max()) + (1 - m.hidden) * both + second
            normed = (summed + f * norm).max()  # a few bytes: what they cost is left out
        else:
            normed = backward + f * norm
        clock = normed + f * adamw
        if several and job.zero1:
            clock = np.full(gpus, clock.max() + gather)
        own += f * (before + s["weights"] + norm + adamw)
    return {"step_ms": clock.max() / steps, "own_ms": own.mean() / steps}


SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
CASES = {  # the windows of a GPU: fixed (weak), or a share of a fixed step (strong)
    "weak, 256 windows a GPU": lambda w: Job(windows=256, zero1=True, wire=2),
    "weak, 256 windows a GPU, all 32,768 candidates": lambda w: Job(windows=256, candidates=32768, zero1=True, wire=2),
    "strong, 4,096 windows a step": lambda w: Job(windows=4096 // w, zero1=True, wire=2),
    "weak, 256 windows a GPU, all-reduce in f32": lambda w: Job(windows=256),
}


def points(m, seed):
    for name, make in CASES.items():
        alone = None
        for w in SIZES:
            job = make(w)
            r = simulate(job, w, m, seed=seed)
            rate = 1e3 * job.windows * w / r["step_ms"]
            alone = alone or rate
            yield {"case": name, "gpus": w, "windows_a_gpu": job.windows, "step_ms": round(r["step_ms"], 4), "own_ms": round(r["own_ms"], 4),
                   "windows_per_s": round(rate), "efficiency": round(rate / w / alone, 4)}


def table(rows):
    lines = ["| GPUs | " + " | ".join(CASES) + " |", "|---" * (len(CASES) + 1) + "|"]
    for w in SIZES:
        cells = [next(r for r in rows if r["case"] == c and r["gpus"] == w) for c in CASES]
        lines.append(f"| {w} | " + " | ".join(f"{r['step_ms']:.2f} ms, {r['windows_per_s']:,}/s, {100 * r['efficiency']:.0f} %" for r in cells) + " |")
    return "\n".join(lines)


def svg(rows):
    """Two panels over log2 of the GPUs: windows/s (log) with the measured points, and efficiency."""
    color = dict(zip(CASES, ("#1b6ca8", "#2a8f5a", "#c0392b", "#8e7cc3")))
    width, height, left, top, bottom = 860, 400, 60, 30, 110
    panel = (width - 3 * left) / 2
    low, high = 4.0, 8.0
    x = lambda k, w: left + k * (panel + left) + panel * math.log2(w) / 10
    y = lambda v: top + (height - top - bottom) * (1 - v)
    rate = lambda v: (math.log10(v) - low) / (high - low)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{height}" fill="white"/>']
    text = lambda a, b, s, more="": out.append(f'<text x="{a:.1f}" y="{b:.1f}" {more}>{s}</text>')
    line = lambda a, b, c, d, more: out.append(f'<line x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}" {more}/>')
    for k, title in enumerate(("windows/s, simulated (circles: measured)", "efficiency against one GPU")):
        text(x(k, 1), top - 12, title, 'font-weight="bold"')
        for w in SIZES[::2]:
            line(x(k, w), y(0), x(k, w), y(1), 'stroke="#eee"')
            text(x(k, w), y(0) + 16, w, 'text-anchor="middle"')
        for i in range(5):
            line(x(k, 1), y(i / 4), x(k, 1024), y(i / 4), 'stroke="#ddd"')
            text(x(k, 1) - 6, y(i / 4) + 4, f"10^{4 + i}" if k == 0 else f"{30 * i} %", 'text-anchor="end"')
        text(x(k, 32), y(0) + 32, "GPUs", 'text-anchor="middle"')
    for i, c in enumerate(CASES):
        mine = [r for r in rows if r["case"] == c]
        dash = ' stroke-dasharray="5 3"' if "all-reduce" in c else ""
        for k, f in enumerate((lambda r: rate(r["windows_per_s"]), lambda r: r["efficiency"] / 1.2)):
            path = " ".join(f"{x(k, r['gpus']):.1f},{y(f(r)):.1f}" for r in mine)
            out.append(f'<polyline points="{path}" fill="none" stroke="{color[c]}" stroke-width="2"{dash}/>')
        row, col = divmod(i, 2)
        line(left + 400 * col, height - 50 + 20 * row, left + 400 * col + 24, height - 50 + 20 * row, f'stroke="{color[c]}" stroke-width="2"{dash}')
        text(left + 400 * col + 30, height - 46 + 20 * row, c + ("" if dash else " *"))
    text(left, height - 8, "* optim.zero1, optim.exchange bf16", 'font-size="10"')
    for _, windows, ms in MEASURED_STEPS:
        out.append(f'<circle cx="{x(0, 1):.1f}" cy="{y(rate(1e3 * windows / ms)):.1f}" r="4" fill="none" stroke="black"/>')
    return "\n".join(out + ["</svg>"]) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--plot", metavar="FILE.svg", help="also draw the points")
    p.add_argument("--table", action="store_true", help="print the table of SCALING.md instead of JSON lines")
    p.add_argument("--seed", type=int, default=1, help="of the stragglers (default 1)")
    for name in ("per_node", "nvlink", "hidden", "net", "jitter", "slow_share", "slow_by"):
        d = getattr(Machine, name)
        p.add_argument("--" + name.replace("_", "-"), type=type(d), default=d, help=f"default {d}")
    a = p.parse_args()
    m = Machine(a.per_node, a.nvlink, a.hidden, a.net, jitter=a.jitter, slow_share=a.slow_share, slow_by=a.slow_by)
    if a.per_node < 1 or min(a.nvlink, a.net) <= 0 or min(a.jitter, a.slow_share, a.slow_by) < 0:
        p.error("bandwidths must be positive, jitter and slow GPUs not negative")
    rows = list(points(m, a.seed))
    print(table(rows) if a.table else "\n".join(json.dumps(r) for r in rows))
    if a.plot:
        with open(a.plot, "w", encoding="ascii") as f:
            f.write(svg(rows))


if __name__ == "__main__":
    main()
