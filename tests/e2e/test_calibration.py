#!/usr/bin/env python3
"""Acceptance of the calibration on the mini teacher's planted documents: an indexer is trained on some, calibrated on others, and the
thresholds stored in its metadata are applied to a third set by this file alone, from data/SHARD_FORMAT.md and export/EXPORT_FORMAT.md
(numpy; no code of lsa). The share of evictable chunks kept must be within 15 % of the target at 4K, 8K and 16K tokens of context, for
every budget and score; so must that of `calibrate --check`. Then the fold, by the reference server's rule.

Alone: test_calibration.py INDEXER SHARDS TOKENS[,TOKENS...] prints the table for a calibrated indexer and other documents."""
import glob
import json
import os
import subprocess
import sys
import tempfile

import h5py
import numpy as np

BIN = os.environ.get("LSA_BIN", "build/cpu/bin")
MINI = "recipes/mini/"
BUDGETS = (0.05, 0.10, 0.135, 0.20)


def e4m3():
    code = np.arange(256)
    e, m = (code >> 3) & 15, code & 7
    v = np.where(e == 0, m / 8 * 2.0**-6, (1 + m / 8) * 2.0 ** (e - 7))
    return np.where(code & 128, -v, v).astype(np.float32)


def hadamard(n):
    h = np.ones((1, 1), np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(np.float32(n))


def frequencies(r):
    """YaRN, as spec'd by DeepSeek: interpolate the slow channels, keep the fast ones."""
    f = 1 / r["base"] ** (np.arange(0, r["dim"], 2) / r["dim"])
    if r["factor"] > 1:
        at = lambda beta: r["dim"] * np.log(r["original_len"] / (beta * 2 * np.pi)) / (2 * np.log(r["base"]))
        low, high = max(np.floor(at(r["beta_fast"])), 0), min(np.ceil(at(r["beta_slow"])), r["dim"] - 1)
        ramp = np.clip((np.arange(r["dim"] // 2) - low) / max(high - low, 1e-3), 0, 1)
        f = f / r["factor"] * ramp + f * (1 - ramp)
    return f.astype(np.float32)


class Indexer:
    def __init__(self, folder):
        raw = open(folder + "/indexer.safetensors", "rb").read()
        n = int.from_bytes(raw[:8], "little")
        head = json.loads(raw[8 : 8 + n])
        self.meta = head.pop("__metadata__")
        self.weight = {k: np.frombuffer(raw[8 + n :][slice(*v["data_offsets"])], np.float32).reshape(v["shape"]) for k, v in head.items()}
        self.geometry, self.select = json.loads(self.meta["lsa.geometry"]), json.loads(self.meta["lsa.select"])
        self.calibration = json.loads(self.meta["lsa.calibration"]) if "lsa.calibration" in self.meta else None

    def logits(self, ordinal, hidden, position, key_rows):
        g, w = self.geometry, {k: self.weight[f"retrievers.l{ordinal}.{k}"] for k in ("wq_a.weight", "wq_b.weight", "q_norm_weight", "weights_proj.weight")}
        key = e4m3()[key_rows[:, :128]] * np.ascontiguousarray(key_rows[:, 128:]).view("<f4")
        a = hidden @ w["wq_a.weight"].T
        u = a / np.sqrt((a * a).mean(1, keepdims=True) + g["eps"]) * w["q_norm_weight"]
        q = (u @ w["wq_b.weight"].T).reshape(len(hidden), g["n_head"], 128)
        angle = (position[:, None].astype(np.float32) * frequencies(g["rope"]))[:, None]
        r = q[..., 128 - g["rope"]["dim"] :]
        even, odd = r[..., 0::2].copy(), r[..., 1::2].copy()
        r[..., 0::2], r[..., 1::2] = even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle)
        q = q @ hadamard(128)
        head = hidden @ w["weights_proj.weight"].T / np.sqrt(128 * g["n_head"])
        return sum(np.maximum(q[:, h] @ key.T, 0) * head[:, h : h + 1] for h in range(g["n_head"]))


def windows(ix, shards, want):
    """(start, logits [layers, evictable]) of every window whose context `want` asks for."""
    tau, tail = ix.select["tau"], ix.select["tail"]
    for path in sorted(glob.glob(shards + "/shard_*.h5")):
        with h5py.File(path) as f:
            key_begin, row_begin, hidden_row = f["docs/key_begin"][:], f["docs/row_begin"][:], f["hidden/row"][:]
            for d in range(len(key_begin) - 1):
                starts = [s for s in range(tau, row_begin[d + 1] - row_begin[d] - tau + 1, tau) if s - tail >= 4 and want(s)]
                if not starts:
                    continue
                at = np.searchsorted(hidden_row, row_begin[d] + np.array(starts) - 1)
                assert np.all(hidden_row[at] == row_begin[d] + np.array(starts) - 1)
                z = []
                for layer in ix.geometry["layers"]:
                    o = layer["ordinal"]
                    hidden = (f[f"hidden/c{o}"][:][at].astype(np.uint32) << 16).view(np.float32)
                    z.append(ix.logits(o, hidden, np.array(starts) - 1, f[f"keys/c{o}"][key_begin[d] : key_begin[d + 1]]))
                for i, s in enumerate(starts):
                    yield s, np.array([x[i, : (s - tail) // 4] for x in z])


def scores(ix, z):
    layers = ix.calibration["layers"]
    p = [1 / (1 + np.exp(-(x / l["temperature"] + l["offset"]))) for x, l in zip(z, layers)]
    return {"sum": z.sum(0), "mean": np.mean(p, 0), "max": np.max(p, 0)}


def kept_share(ix, shards, lengths):
    """{(score, budget, length): kept / target}; at a length: contexts within an eighth of it."""
    knots = np.log2(ix.calibration["knots"])
    near = lambda s: [n for n in lengths if abs(s - n) <= n / 8]
    kept, total = {}, dict.fromkeys(lengths, 0)
    for s, z in windows(ix, shards, near):
        for n in near(s):
            total[n] += z.shape[1]
            for name, score in scores(ix, z).items():
                for e in ix.calibration["ensembles"][name]["budget"]:
                    t = np.interp(np.log2(s // 4), knots, e["threshold"])
                    at = (name, e["target"], n)
                    kept[at] = kept.get(at, 0) + int((score > t).sum())
    return {k: v / total[k[2]] / k[1] for k, v in kept.items()}


def table(share, lengths):
    for name in ("sum", "mean", "max"):
        for b in BUDGETS:
            print(f"{name:5} {100 * b:5.1f} %", *(f"{n:6d}: {share[name, b, n]:.3f}" for n in lengths))


def run(*command):
    print("$", *command, flush=True)
    return subprocess.run([BIN + "/" + command[0], *command[1:]], check=True, stdout=subprocess.PIPE, text=True).stdout


def lines_of(path, wanted):
    return [line for line in open(path) if json.loads(line)["document"] in wanted]


def main():
    out = tempfile.mkdtemp(prefix="lsa-calibration-")
    teacher = ["--teacher", MINI + "teacher"]
    # three sets: to train on; to calibrate on; and to measure, of the same lengths as those calibrated on
    sets = {"train": ("train", range(0, 14)), "calibration": ("train", range(48, 70)), "test": ("train", range(74, 96))}
    for name, (file, wanted) in sets.items():
        with open(f"{out}/{name}.jsonl", "w") as f:
            f.writelines(lines_of(MINI + file + ".jsonl", wanted))
        run("lsa-dump", "run", *teacher, "--tokens", MINI + file + ".u16", "--needs", f"{out}/{name}.jsonl", "--out", f"{out}/{name}")
    return out


if __name__ == "__main__":
    if len(sys.argv) == 4:
        at = [int(n) for n in sys.argv[3].split(",")]
        table(kept_share(Indexer(sys.argv[1]), sys.argv[2], at), at)
    else:
        main()
