#!/usr/bin/env python3
"""recipes/scaling_model.py against closed forms, the measured steps of one GPU, the C estimate (which shares no code with it), and what
recipes/SCALING.md and its plot say."""
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

try:
    import numpy as np
except ModuleNotFoundError:
    print("skipped: no numpy")
    sys.exit(77)

root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../..")
path = os.path.join(root, "recipes/scaling_model.py")
spec = importlib.util.spec_from_file_location("scaling_model", path)
sm = importlib.util.module_from_spec(spec)
sys.modules["scaling_model"] = sm  # dataclasses look there
sys.dont_write_bytecode = True
spec.loader.exec_module(sm)

even = sm.Machine(jitter=0, slow_share=0)  # no stragglers
free = replace(even, nvlink=1e30, net=1e30, base=0, ring_nvlink=0, ring_net=0, tree_nvlink=0, tree_net=0)


def close(what, got, want, share=1e-9):
    assert abs(got - want) <= share * abs(want), (what, got, want)


def step(job, gpus, m, **more):
    return sm.simulate(job, gpus, m, **more)["step_ms"]


# the measured steps of one GPU
for kind, windows, ms in sm.MEASURED_STEPS:
    close((kind, windows), step(sm.Job(windows=windows, candidates=32768 if kind == "full" else 2048), 1, even), ms, 0.1)

# nothing hidden: the step is its stages, its slice of the norm, and the exchanges of 268.4 M and 71.3 M elements
t = sm.stage_ms(sm.Job())
work = sum(t.values())
wq_b, others = 8 * 128 * 128 * 2048, 339755008 - 8 * 128 * 128 * 2048
assert sm.PARAMETERS == wq_b + others
for gpus, nodes in ((2, 1), (8, 1), (64, 8), (1024, 128)):
    speed = 260e6  # bytes a ms; the network of a node is faster
    left = work - t["norm"] * (1 - 1 / gpus)
    hops = 1e-3 * ((gpus - nodes) * 3.4 + (nodes - 1) * 9.6)
    ring = lambda n, passes: 8.4e-3 + passes * (hops + (gpus - 1) / gpus * n / speed)
    alone = sm.Job(overlap=False, algorithm="ring")
    close(("ring", gpus), step(alone, gpus, even), left + ring(4 * wq_b, 2) + ring(4 * others, 2))
    close(("ZeRO-1", gpus), step(replace(alone, zero1=True), gpus, even),
          left - t["adamw"] * (1 - 1 / gpus) + ring(4 * wq_b, 1) + ring(4 * others, 1) + ring(2 * sm.PARAMETERS, 1))
    close(("bf16", gpus), step(replace(alone, wire=2), gpus, even),
          left - t["norm"] / gpus / 2 - t["adamw"] * 2 / 30 + ring(2 * wq_b, 2) + ring(2 * others, 2))
    up_and_down = lambda n: 2 * (1e-3 * ((gpus // nodes - 1) * 28 + math.log2(nodes) * 50) + n / speed)
    close(("tree", gpus), step(replace(alone, algorithm="tree"), gpus, even), left + up_and_down(4 * wq_b) + up_and_down(4 * others))
# links of no resistance: only work is left; ZeRO-1 shares norm and AdamW, else the norm alone is shared
for gpus in (1, 2, 64, 1024):
    close(("free links", gpus), step(sm.Job(), gpus, free), work - t["norm"] * (1 - 1 / gpus))
    close(("free links, ZeRO-1", gpus), step(sm.Job(zero1=True), gpus, free), work - 4.0 * (1 - 1 / gpus))
# overlap: slow links hide what runs after wq_b's gradients (44 % of the FLOPs, 79 % of the writing) and no more; fast ones hide all of the first exchange
rest = t["weights"] - 256 * 1.142 / 768 * 2 * wq_b / (2 * wq_b + 2 * sm.PARAMETERS) - (0.804 - 256 * 1.142 / 768) * wq_b / sm.PARAMETERS
slow, fast = replace(even, nvlink=1.0), replace(free, nvlink=1e5)
gain = lambda m: step(sm.Job(overlap=False, algorithm="ring"), 8, m) - step(sm.Job(algorithm="ring"), 8, m)
for share in (0.0, 0.5, 1.0):
    close("hidden behind the backward pass", gain(replace(slow, hidden=share)), share * rest, 1e-6)
    close("hidden wholly", gain(replace(fast, hidden=share)), share * sm.ring_ms(4 * wq_b, 8, fast, 2), 1e-6)
# two GPUs, as recipes/scaling.sh measured them
for windows, zero1, wire, overlap, ms in sm.MEASURED_TWO:
    close(("two GPUs", windows, zero1, wire, overlap), step(sm.Job(windows=windows, zero1=zero1, wire=wire, overlap=overlap), 2, even), ms, 0.06)

# stragglers: one GPU in all, 5 % slower, costs everybody 5 %; the mean of the slowest of W half-normal delays, by their distribution
always = replace(free, slow_share=1.0, slow_by=0.05)
close("all slow", step(sm.Job(), 16, always), 1.05 * (work - t["norm"] * 15 / 16))
noise = replace(free, jitter=0.01)
for gpus in (1, 8, 256):
    u = (np.arange(200000) + 0.5) / 200000  # quantiles of the largest of W: erf(x/sqrt 2)^W = u
    x = np.linspace(0, 6, 60001)
    cdf = np.array([math.erf(v / math.sqrt(2)) for v in x]) ** gpus
    worst = float(np.interp(u, cdf, x).mean())
    # ZeRO-1 meets after the gradients, the norm and the weights: every part of a step is the slowest GPU's, the same one
    got = step(sm.Job(overlap=False, zero1=True), gpus, noise, steps=4000) / (work - 4.0 * (1 - 1 / gpus)) - 1
    close(("slowest of", gpus), got, 0.01 * worst, 0.03)
assert step(sm.Job(), 64, sm.Machine(), seed=3) == step(sm.Job(), 64, sm.Machine(), seed=3) != step(sm.Job(), 64, sm.Machine(), seed=4)
last = 0
for gpus in sm.SIZES:
    now = step(sm.Job(), gpus, sm.Machine())
    assert now > last, (gpus, now, last)  # the same work each: never faster with more to wait for
    last = now
# rings win on few GPUs, trees on many
assert sm.ring_ms(1e9, 8, even, 2) < sm.tree_ms(1e9, 8, even) and sm.ring_ms(1e7, 1024, even, 2) > sm.tree_ms(1e7, 1024, even)

# the C estimate, which has the same assumptions in closed form
program = os.environ.get("LSA_BIN")
for gpus, batch, zero1, wire, everything in ((1, 64, 0, 4, 0), (8, 2048, 0, 4, 0), (8, 2048, 1, 4, 0), (8, 512, 0, 2, 0), (64, 4096, 1, 2, 0), (256, 65536, 0, 4, 0),
                                             (8, 2048, 1, 2, 1)) if program else ():
    sets = [f"train.batch={batch}", f"data.virtual_shards={256 if gpus > 1 else 1}", f"optim.zero1={'true' if zero1 else 'false'}",
            f"optim.exchange={'f32' if wire == 4 else 'bf16'}"]
    if everything:
        sets += ["sample.candidates=all", "loss.kind=kl", "loss.on=sum"]
    cmd = [os.path.join(program, "lsa-train"), "config", "--recipe", os.path.join(root, "recipes/v4-flash-joint8.yaml"), "--json",
           "--estimate", f"gpus={gpus},nodes={max(1, gpus // 8)}"] + [x for s in sets for x in ("--set", s)]
    e = json.loads(subprocess.run(cmd, check=True, capture_output=True, text=True).stdout)
    job = sm.Job(windows=batch // gpus, zero1=bool(zero1), wire=wire, algorithm="ring", candidates=32768 if everything else 2048)
    close(("estimate", gpus, batch, zero1, wire), e["step_ms"], step(job, gpus, even), 1e-6)

# what the script prints and draws, and what SCALING.md shows of it
run = lambda *a: subprocess.run([sys.executable, path, *a], check=True, capture_output=True, text=True).stdout
rows = [json.loads(line) for line in run().splitlines()]
assert len(rows) == len(sm.CASES) * len(sm.SIZES) and all(r["windows_per_s"] > 0 and 0 < r["efficiency"] < 1.2 for r in rows)
with open(os.path.join(root, "recipes/SCALING.md"), encoding="utf-8") as f:
    doc = f.read()
for line in run("--table").splitlines():
    assert line in doc, f"recipes/SCALING.md lacks: {line}"
drawing = sm.svg(rows)
ET.fromstring(drawing)
with open(os.path.join(root, "recipes/scaling_model.svg"), encoding="ascii") as f:
    assert f.read() == drawing, "recipes/scaling_model.svg is not what scaling_model.py --plot draws"
assert len(re.findall("<polyline", drawing)) == 2 * len(sm.CASES)
bad = subprocess.run([sys.executable, path, "--nvlink", "-1"], capture_output=True, text=True)
assert bad.returncode == 2 and "positive" in bad.stderr
print("ok")
