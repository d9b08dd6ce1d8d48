#!/usr/bin/env python3
"""export/abi/retrieve_topk.py on an export of the planted teacher against numpy alone: logits from the tensors of the
file, the order of chunks and pages by sorting."""
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
from safetensors import safe_open

sys.path.insert(0, "export/abi")
import retrieve_topk as r

BIN, LIBRARY = os.environ["LSA_BIN"], os.path.join(os.environ["LSA_BUILD"], "lib", "liblsa_indexer.so")
if "LSA_SANITIZE:STRING=" in (cache := open(os.path.join(os.environ["LSA_BUILD"], "CMakeCache.txt")).read()) and "LSA_SANITIZE:STRING=\n" not in cache:
    print("skipped: a sanitized library needs a sanitized program")
    sys.exit(77)


def run(program, *args):
    p = subprocess.run([f"{BIN}/{program}", *args], capture_output=True, text=True)
    if p.returncode:
        sys.exit(f"{program} {args[0]}: exit {p.returncode}\n{p.stderr}")


def logits(t, geometry, ordinal, x, position, keys):
    """Notes 5.1 in double precision, angles in f32. keys [n, 128]."""
    get = lambda name: t[f"retrievers.l{ordinal}.{name}"].astype(np.float64)
    a = get("wq_a.weight") @ x
    u = get("q_norm_weight") * a / np.sqrt((a * a).mean() + geometry["eps"])
    q = (get("wq_b.weight") @ u).reshape(-1, 128)
    rope = geometry["rope"]
    half = rope["dim"] // 2
    f = (1 / np.float32(rope["base"] ** (np.arange(half) * 2 / rope["dim"]))).astype(np.float32)
    if rope["factor"] != 1:
        at = lambda beta: rope["dim"] * np.log(rope["original_len"] / (beta * 2 * np.pi)) / (2 * np.log(rope["base"]))
        lo, hi = max(np.floor(at(rope["beta_fast"])), 0), min(np.ceil(at(rope["beta_slow"])), rope["dim"] - 1)
        blend = np.clip((np.arange(half) - lo) / (hi - lo or 0.001), 0, 1).astype(np.float32)
        f = f / np.float32(rope["factor"]) * blend + f * (1 - blend)
    angle = (np.float32(position) * f.astype(np.float32)).astype(np.float64)
    turned = (q[:, -rope["dim"] :: 2] + 1j * q[:, 129 - rope["dim"] :: 2]) * np.exp(1j * angle)
    q[:, -rope["dim"] :: 2], q[:, 129 - rope["dim"] :: 2] = turned.real, turned.imag
    h = np.array([[1.0]])
    while len(h) < 128:
        h = np.block([[h, h], [h, -h]])
    w = get("weights_proj.weight") @ x / np.sqrt(128 * len(q))
    return np.maximum(keys @ (q @ h / np.sqrt(128)).T, 0) @ w


def e4m3(code):
    c = code.astype(np.int64)
    e, m = (c >> 3) & 15, c & 7
    return np.where(c & 128, -1.0, 1.0) * np.where(e == 0, m / 8 * 2.0**-6, (1 + m / 8) * 2.0 ** (e - 7))


def main():
    work = tempfile.TemporaryDirectory(prefix="lsa-abi-")
    run("lsa-dump", "synth", "--out", f"{work.name}/shards", "--docs", "6", "--tokens", "1024", "--layers", "3", "--hidden", "32")
    run("lsa-train", "run", "--recipe", "recipes/smoke.yaml", "--data", f"{work.name}/shards", "--out", f"{work.name}/run", "--device", "cpu", "--set",
        "train.steps=20", "--set", "sample.val_documents=0")
    run("lsa-export", "write", f"{work.name}/run", "--out", f"{work.name}/indexer")
    with safe_open(f"{work.name}/indexer/indexer.safetensors", "numpy") as s:
        tensors = {k: s.get_tensor(k) for k in s.keys()}
        geometry = json.loads(s.metadata()["lsa.geometry"])
        select = json.loads(s.metadata()["lsa.select"])
    x = r.Indexer(f"{work.name}/indexer", LIBRARY, max_batch=4, max_chunks=4096)
    i, rng, m = x.info, np.random.default_rng(3), 3
    assert (i.hidden, i.n_layer, i.tau, i.tail) == (geometry["hidden"], len(geometry["layers"]), select["tau"], select["tail"])
    lengths = np.array([4 * 900 + 3, 4 * 63, 2], np.int64)
    page_table = rng.permutation(64).astype(np.int32)[: m * 15].reshape(m, 15)
    hidden = [(rng.standard_normal((m, i.hidden)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for _ in range(i.n_layer)]
    pools, z = [], np.zeros((i.n_layer, m, 960))
    for l in range(i.n_layer):
        code = rng.integers(0, 256, (64, 64, 128), np.uint8)
        code[(code & 0x7F) == 0x7F] = 0
        scale = rng.uniform(1e-3, 1e-2, (64, 64)).astype(np.float32)
        pools.append(np.concatenate([code.reshape(64, -1), scale.view(np.uint8)], 1))
        for q in range(m):
            keys = (e4m3(code) * scale[:, :, None])[page_table[q]].reshape(-1, 128)
            bf16 = (hidden[l][q].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
            z[l, q] = logits(tensors, geometry, geometry["layers"][l]["ordinal"], bf16, lengths[q] - 1, keys)
    score = z.sum(0)
    for pages in (False, True):
        for k, sink, tail in ((50, 0, 0), (7, 5, 100), (1, 0, -1)):
            threshold = float(np.quantile(score[0, :900], 0.9))
            ids, counts = r.retrieve_topk(x, hidden, lengths - 1, pools, page_table, lengths, k, pages, sink, tail, threshold, ensemble=r.SUM)
            for q in range(m):
                n = lengths[q] // 4
                keep_tail = min(-(-i.tail // 4) if tail < 0 else tail, max(n - sink, 0))
                forced = np.arange(n) < sink
                forced[n - keep_tail :] = True
                order = sorted(np.flatnonzero(~forced), key=lambda c: (-score[q, c], c))
                if pages:
                    p = [(not forced[c : min(c + 64, n)].any(), -(score[q, c : min(c + 64, n)] > threshold).sum(), -score[q, c : min(c + 64, n)].max(), c // 64)
                         for c in range(0, n, 64)]
                    want = sorted(t[3] for t in sorted(p)[: max(k, sum(not t[0] for t in p))])
                else:
                    want = sorted([*order[:k], *np.flatnonzero(forced)])
                got = ids[q, : counts[q]].tolist()
                assert got == [int(c) for c in want], (pages, k, sink, tail, q, got, want)
    try:
        r.retrieve_topk(x, hidden, lengths - 1 - 10, pools, page_table, lengths, 5)
        sys.exit("a negative position was accepted")
    except RuntimeError as e:
        assert "position" in str(e), e
    x.close()
    try:
        r.Indexer(f"{work.name}/run", LIBRARY)
        sys.exit("a folder without an export was accepted")
    except RuntimeError as e:
        assert "indexer.safetensors" in str(e), e
    out = subprocess.run([sys.executable, "export/abi/retrieve_topk.py", f"{work.name}/indexer", LIBRARY], capture_output=True, text=True)
    assert out.returncode == 0 and "chunks kept" in out.stdout, out
    print("ok:", out.stdout.splitlines()[-1])


main()
