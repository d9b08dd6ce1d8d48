#!/usr/bin/env python3
"""lsa-dump verify --recheck: every stored array, forged by one number with all checksums made good again, is found by it and only by it."""
import array
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile

import h5py
import numpy as np

sys.path.insert(0, "tests/testkit")
from xxh64 import xxh64  # noqa: E402

BIN = os.environ["LSA_BIN"]
os.environ["OMP_NUM_THREADS"] = "2"
work = tempfile.mkdtemp(prefix="lsa-recheck-")
TEACHER = "recipes/mini/teacher"
failed = []


def lsa(*args):
    p = subprocess.run([f"{BIN}/lsa-dump", *args], capture_output=True, text=True)
    return p.returncode, p.stdout + p.stderr


def expect(code, text, *args):
    rc, out = lsa(*args)
    if rc != code or text not in out or out.count("error:") > 1:
        failed.append(args)
        print(f"FAILED: exit {rc}, expected {code} and '{text}': lsa-dump {' '.join(args)}\n{out}")
    return out


def documents(name, docs):
    with open(f"{work}/{name}", "w") as f:
        for i, d in enumerate(docs):
            print(json.dumps({"tokens": d, "name": f"{name}-{i}"}), file=f)
    return f"{work}/{name}"


def forge(dataset, change):
    """A copy of the shards with change(values) applied to one dataset of the last shard, and every hash that covers it made anew."""
    shutil.rmtree(f"{work}/forged", ignore_errors=True)
    shutil.copytree(f"{work}/shards", f"{work}/forged")
    manifest = json.load(open(f"{work}/forged/manifest.json"))
    entry = manifest["shards"][-1]
    path = f"{work}/forged/{entry['file']}"
    with h5py.File(path) as f:
        x, at = f[dataset][:], f[dataset].id.get_offset()
        extra = {k: f[k][:] for k in ("stats/c1/begin",)}
    before = x.tobytes()
    change(x, extra)
    after = x.tobytes()
    raw = bytearray(open(path, "rb").read())
    assert raw[at : at + len(before)] == before and before != after
    raw[at : at + len(after)] = after
    head = entry["head_bytes"]
    old, new = (b"%016x" % xxh64(b) for b in (before, after))
    assert raw[:head].count(old) == 1, "the hash of the dataset stands once in the head"
    raw[: head] = raw[:head].replace(old, new)
    open(path, "wb").write(raw)
    entry["head_xxh64"], entry["xxh64"] = "%016x" % xxh64(raw[:head]), "%016x" % xxh64(raw)
    json.dump(manifest, open(f"{work}/forged/manifest.json", "w"))


def bit(at, mask=1):
    def change(x, extra):
        flat = x.reshape(-1)
        v = flat.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[flat.dtype.itemsize])
        v[at] ^= mask
    return change


def other_chunk(x, extra):
    """In the last row with a gap, a selected chunk gives way to its neighbour that was not selected."""
    begin = extra["stats/c1/begin"]
    for row in range(len(begin) - 2, 0, -1):
        for j in range(begin[row], begin[row + 1] - 1):
            if x[j] + 1 < x[j + 1]:
                x[j] += 1
                return
    raise AssertionError("no row to forge")


try:
    ids = array.array("H", open("recipes/mini/train.u16", "rb").read(2 * 4096)).tolist()
    docs = [ids[i * 420 : i * 420 + (90 + 10 * i if i < 4 else 330)] for i in range(5)]  # the last one selects: more than 64 chunks
    tokens = documents("docs.jsonl", docs)
    rc, out = lsa("run", "--teacher", TEACHER, "--tokens", tokens, "--dense-every", "64", "--shard-bytes", "200K", "--out", f"{work}/shards")
    assert rc == 0, out
    shards = json.load(open(f"{work}/shards/manifest.json"))["shards"]
    assert len(shards) > 1 and shards[-1]["documents"] >= 1, shards
    out = expect(0, "ok: 5 documents", "verify", f"{work}/shards", "--recheck", "99")

    # every number that is stored is counted: what the manifest's shards hold, apart from tables, offsets and probes
    count = 0
    for s in shards:
        with h5py.File(f"{work}/shards/{s['file']}") as f:
            rows = len(f["rows/position"])
            count += rows + len(f["labels/votes"])
            for o in range(3):
                x = f[f"stats/c{o}"]
                count += len(f[f"keys/c{o}"]) + f[f"hidden/c{o}"].size + rows * 3 + len(x["logit"]) * 2
                x = f[f"dense/c{o}"]
                count += 2 * len(x["row"]) + len(x["mass"])
    assert f"{count} stored values" in out, (count, out)

    forged = {
        "keys/c1": (bit(-10), "index keys of layer c1"),
        "hidden/c2": (bit(-300), "numbers of hidden vectors of layer c2"),
        "labels/votes": (lambda x, e: x.__setitem__(-1, 3 - min(int(x[-1]), 2)), "vote counts"),
        "stats/c1/chunk": (other_chunk, "1 of 330 rows of selected chunks of layer c1"),
        "stats/c0/logit": (bit(-5), "native logits of layer c0"),
        "stats/c2/native_mass": (bit(-7), "native masses of layer c2"),
        "stats/c1/local_mass": (bit(-1), "masses of the window of layer c1"),
        "stats/c1/sink_mass": (bit(-3), "masses of the sink of layer c1"),
        "dense/c0/mass": (bit(-2), "dense masses of layer c0"),
        "dense/c2/rest": (bit(-1), "dense masses that were cut of layer c2"),
    }
    for dataset, (change, text) in forged.items():
        forge(dataset, change)
        expect(0, "ok:", "verify", f"{work}/forged")
        out = expect(3, text, "verify", f"{work}/forged", "--recheck", "5")
        assert "1 of 5 rechecked documents differ" in out and out.count("differ from the teacher") == 1, (dataset, out)
        assert "document 4 ('docs.jsonl-4'): 1 of " in out, (dataset, out)

    # which documents: some seeds draw the forged one of five, some do not, and a seed always draws the same
    seed = lambda s: lsa("verify", f"{work}/forged", "--recheck", "2", "--seed", str(s))[0]
    runs = [seed(s) for s in range(6)]
    assert set(runs) == {0, 3} and runs[:3] == [seed(s) for s in range(3)], runs

    # inputs that moved, and inputs that are others
    forge("hidden/c2", bit(-300))
    shutil.copytree(TEACHER, f"{work}/moved")
    expect(3, "hidden vectors", "verify", f"{work}/forged", "--recheck", "5", "--teacher", f"{work}/moved")
    expect(0, "bit for bit", "verify", f"{work}/shards", "--recheck", "1", "--teacher", f"{work}/moved")
    docs[3][17] ^= 1
    changed = documents("changed.jsonl", docs)
    expect(3, "1 of 5 documents are not those that were dumped, first document 3 ('docs.jsonl-3')", "verify", f"{work}/shards", "--recheck", "1", "--tokens", changed)
    expect(3, "holds 4 documents, the shards 5", "verify", f"{work}/shards", "--recheck", "1", "--tokens", documents("four.jsonl", docs[:4]))
    os.remove(tokens)
    expect(1, "docs.jsonl", "verify", f"{work}/shards", "--recheck", "1")
    docs[3][17] ^= 1
    expect(0, "bit for bit", "verify", f"{work}/shards", "--recheck", "1", "--tokens", documents("again.jsonl", docs))
    config = json.load(open(f"{work}/moved/config.json"))
    config["routed_scaling_factor"] = 1.25
    os.chmod(f"{work}/moved/config.json", 0o644)
    json.dump(config, open(f"{work}/moved/config.json", "w"))
    expect(3, "is not the teacher of these shards", "verify", f"{work}/shards", "--recheck", "1", "--tokens", f"{work}/again.jsonl", "--teacher", f"{work}/moved")
    expect(2, "belong to --recheck", "verify", f"{work}/shards", "--seed", "3")
    expect(2, "--recheck", "verify", f"{work}/shards", "--recheck", "-1")
    lsa("synth", "--docs", "2", "--tokens", "512", "--out", f"{work}/synth")
    expect(3, "not made by 'lsa-dump run'", "verify", f"{work}/synth", "--recheck", "1")
    print(f"{len(forged)} forged arrays found, {count} values compared")
finally:
    shutil.rmtree(work, ignore_errors=True)
sys.exit(1 if failed else 0)
