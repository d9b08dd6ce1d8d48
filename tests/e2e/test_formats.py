#!/usr/bin/env python3
"""What others read: shards with h5py, the exported file with Python's safetensors, event files with TensorBoard, the report in a browser.

One small chain (mini teacher, two documents), then every artefact through the reader its users have."""
import json
import os
import shutil
import subprocess
import sys
import tempfile

import h5py
import numpy as np
from safetensors import safe_open

BIN = os.environ["LSA_BIN"]
work = tempfile.mkdtemp(prefix="lsa-formats-")
TEACHER, TOKENS, NEEDS = "recipes/mini/teacher", "recipes/mini/val.u16", "recipes/mini/val.jsonl"


def run(program, *args):
    p = subprocess.run([f"{BIN}/{program}", *args], capture_output=True, text=True)
    if p.returncode:
        sys.exit(f"{program} {args[0]}: exit {p.returncode}\n{p.stderr}")
    return p.stdout


def e4m3(code):
    code = code.astype(np.int64)
    e, m = (code >> 3) & 15, code & 7
    return np.where(code & 128, -1.0, 1.0) * np.where(e == 0, m / 8 * 2.0**-6, (1 + m / 8) * 2.0 ** (e - 7))


def shards():
    run("lsa-dump", "run", "--teacher", TEACHER, "--tokens", TOKENS, "--needs", NEEDS, "--documents", "0:2", "--dense-every", "512", "--out", f"{work}/shards")
    manifest = json.load(open(f"{work}/shards/manifest.json"))
    assert manifest["format"] == "lsa-shard/1" and manifest["complete"] and len(manifest["layers"]) == 3
    needs = [json.loads(line) for line in open(NEEDS)][:2]
    with h5py.File(f"{work}/shards/{manifest['shards'][0]['file']}") as f:
        assert f.attrs["format"] in (b"lsa-shard/1", "lsa-shard/1"), f.attrs["format"]
        tokens = f["docs/n_tokens"][:]
        assert tokens.tolist() == [n["tokens"] for n in needs]
        rows, keys = f["docs/row_begin"][:], f["docs/key_begin"][:]
        assert rows[-1] == tokens.sum() and np.array_equal(np.diff(keys), tokens // 4)
        position, visible = f["rows/position"][:], f["rows/visible"][:]
        assert np.array_equal(position, np.concatenate([np.arange(t) for t in tokens])) and np.array_equal(visible, (position + 1) // 4)
        at = f["hidden/row"][:]
        assert np.array_equal(at, np.flatnonzero((position + 1) % 64 == 0))
        begin, chunk, votes = f["labels/begin"][:], f["labels/chunk"][:], f["labels/votes"][:]
        assert begin[0] == 0 and begin[-1] == len(chunk) == len(votes) and (np.diff(begin) >= 0).all()
        assert votes.min() >= 1 and votes.max() <= 3 and (chunk < np.repeat(visible, np.diff(begin))).all()
        for o in range(3):
            k = f[f"keys/c{o}"]
            assert k.shape == (keys[-1], 132) and k.dtype == np.uint8 and k.chunks is None and k.id.get_offset() > 0
            scale = k[:, 128:].copy().view("<f4")
            assert np.isfinite(e4m3(k[:, :128]) * scale).all() and (scale > 0).all()
            h = f[f"hidden/c{o}"]
            assert h.shape == (len(at), 256) and h.dtype == np.uint16
            x = (h[:].astype(np.uint32) << 16).view(np.float32)
            assert np.isfinite(x).all() and x.std() > 0
            s = f[f"stats/c{o}"]
            b, mass = s["begin"][:], s["native_mass"][:].astype(np.float64)
            assert mass.dtype == np.float64 and s["native_mass"].dtype == np.float16 and s["logit"].dtype == np.float16
            n = np.diff(b)
            assert np.array_equal(n, np.minimum(visible, 64)), "every selected entry of a row is kept"
            total = np.add.reduceat(np.append(mass, 0), b[:-1]) * (n > 0) + s["local_mass"][:] + s["sink_mass"][:]
            assert np.abs(total - 1).max() < 4e-3, np.abs(total - 1).max()  # f16 entries
            d = f[f"dense/c{o}"]
            r, db = d["row"][:], d["begin"][:]
            assert ((position[r] + 1) % 512 == 0).all() and len(db) == len(r) + 1 and db[-1] == len(d["chunk"]) == len(d["mass"])
            assert d["rest"].shape == r.shape
        for name in ("docs/token_xxh64", "docs/name"):
            assert len(f[name]) == 2
        assert any(k.startswith("probe") for k in f)
        names = []
        f.visititems(lambda n, x: names.append(n) if isinstance(x, h5py.Dataset) else None)
        assert all("xxh64" in f[n].attrs and f[n].chunks is None and f[n].compression is None for n in names)
        print(f"shard: {len(names)} datasets read by h5py {h5py.__version__}")


def training():
    run("lsa-train", "run", "--recipe", "recipes/mini-cpu.yaml", "--data", f"{work}/shards", "--out", f"{work}/run", "--device", "cpu", "--set", "train.steps=20",
        "--set", "sample.val_documents=1", "--set", "train.eval_every=10", "--set", "train.save_every=10")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    acc = EventAccumulator(f"{work}/run/tb")
    acc.Reload()
    scalars = acc.Tags()["scalars"]
    by_step = {}
    for line in open(f"{work}/run/metrics.jsonl"):
        row = json.loads(line)
        if "loss" in row:
            by_step[row["step"]] = row["loss"]
    tag = next(t for t in scalars if t.endswith("loss"))
    events = {e.step: e.value for e in acc.Scalars(tag)}
    assert by_step and all(abs(events[s] - v) < 1e-6 * max(1, abs(v)) for s, v in by_step.items()), (events, by_step)
    assert any("captured" in t for t in scalars), scalars
    print(f"event files: {len(scalars)} scalars read by TensorBoard")


def export():
    run("lsa-export", "write", f"{work}/run", "--out", f"{work}/indexer")
    run("lsa-export", "verify", f"{work}/indexer", "--checkpoint", f"{work}/run")
    want = {f"retrievers.l{o}.{part}": shape for o in range(3) for part, shape in
            (("wq_a.weight", [128, 256]), ("wq_b.weight", [16 * 128, 128]), ("q_norm_weight", [128]), ("weights_proj.weight", [16, 256]))}
    with safe_open(f"{work}/indexer/indexer.safetensors", "numpy") as f:
        assert {k: list(f.get_slice(k).get_shape()) for k in f.keys()} == want
        params = {k: f.get_tensor(k) for k in f.keys()}
        meta = f.metadata()
    assert all(v.dtype == np.float32 and np.isfinite(v).all() for v in params.values())
    geometry = json.loads(meta["lsa.geometry"])
    assert [(x["ordinal"], x["id"]) for x in geometry["layers"]] == [(0, 1), (1, 3), (2, 5)]
    with safe_open(f"{work}/indexer/golden.safetensors", "numpy") as f:  # what it says: test_conformance.py
        assert f.get_tensor("l2.fp8.logit").shape == (4, 48) and f.metadata()["lsa.format"] == "lsa-golden/2"
    assert "Memory indexer" in open(f"{work}/indexer/README.md").read()


def report():
    run("lsa-decode", "validate", "--teacher", TEACHER, "--tokens", TOKENS, "--needs", NEEDS, "--documents", "0:1", "--indexer", f"{work}/indexer", "--policy",
        "full,lsa,oracle,recency", "--budget", "0.05,0.10,0.20", "--report", f"{work}/report")
    page = open(f"{work}/report/report.html").read()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page and "<script" not in page, "the page must be self-contained"
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        sys.exit("chromium is missing; bash recipes/install-deps.sh --tests installs it")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={work}/chromium"]
    dom = subprocess.run([browser, *flags, "--dump-dom", f"file://{work}/report/report.html"], capture_output=True, text=True, timeout=120).stdout
    for needle in ('id="policies"', 'id="loss"', 'id="captured"', 'id="recalled"', 'id="memory"', 'id="heat-lsa"', 'id="heat-oracle"', "</html>"):
        assert needle in dom, f"{needle} is not in the page the browser built"
    assert "nan" not in dom.lower().replace("nano", "") and "inf<" not in dom
    shot = os.environ.get("LSA_SCREENSHOT", f"{work}/page.png")
    subprocess.run([browser, *flags, f"--screenshot={shot}", "--window-size=1100,2600", f"file://{work}/report/report.html"], capture_output=True, timeout=120)
    assert os.path.getsize(shot) > 30000, "the screenshot is empty"
    print(f"report: {len(page)} bytes, drawn by a headless browser")


try:
    shards()
    training()
    export()
    report()
finally:
    shutil.rmtree(work, ignore_errors=True)
