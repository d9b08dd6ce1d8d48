#!/usr/bin/env python3
"""lsa-dump plan: every part of the disk and the host memory against what a dump really took, the published geometries from config.json alone,
and refusals whose advice, when followed, fits."""
import array
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile

import h5py

BIN = os.environ["LSA_BIN"]
os.environ["OMP_NUM_THREADS"] = "2"
work = tempfile.mkdtemp(prefix="lsa-plan-")
TEACHER, FLASH, PRO = "recipes/mini/teacher", "tests/fixtures/v4-flash", "tests/fixtures/v4-pro"
GIB = 1 << 30


def lsa(*args, code=0):
    p = subprocess.run([f"{BIN}/lsa-dump", *args], capture_output=True, text=True)
    assert p.returncode == code, (args, p.returncode, p.stdout, p.stderr)
    assert p.stderr.count("error:") == (code != 0), p.stderr
    return p.stdout, p.stderr


def plan(*args, code=0):
    out, err = lsa("plan", "--json", *args, code=code)
    p = json.loads(out)
    assert p["fits"] == (code == 0) and sum(p["disk"].values()) == p["disk_bytes"] and sum(p["host"].values()) == p["host_bytes"], p
    return p, err


def documents(lengths):
    ids = array.array("H", open("recipes/mini/train.u16", "rb").read(2 * 65536)).tolist()
    path = f"{work}/docs.jsonl"
    with open(path, "w") as f:
        at = 0
        for n in lengths:
            print(json.dumps({"tokens": ids[at : at + n]}), file=f)
            at += n
    return path


def stored(folder):
    """Bytes of the datasets of all shards by part."""
    part = dict.fromkeys(("keys", "hidden", "votes", "stats", "dense", "tables"), 0)
    files = [s["file"] for s in json.load(open(f"{folder}/manifest.json"))["shards"]]
    total = 0
    for file in files:
        total += os.path.getsize(f"{folder}/{file}")
        with h5py.File(f"{folder}/{file}") as f:
            def count(name, x):
                if isinstance(x, h5py.Dataset):
                    top = name.split("/")[0]
                    part[{"labels": "votes"}.get(top, top if top in part else "tables")] += x.size * x.dtype.itemsize
            f.visititems(count)
    return part, total, len(files)


def against_dumps():
    lengths = [300, 7, 1500, 64, 700]
    tokens = documents(lengths)
    for options in ([], ["--no-stats", "--layers", "1", "--hidden-stride", "16", "--pool", "16"], ["--dense-every", "32", "--dense-min", "1e-3", "--top-p", "0.9", "--layers", "0,2"]):
        shutil.rmtree(f"{work}/s", ignore_errors=True)
        options = ["--teacher", TEACHER, "--tokens", tokens, "--shard-bytes", "50K", *options]
        p, _ = plan(*options)
        lsa("run", *options, "--out", f"{work}/s")
        got, total, shards = stored(f"{work}/s")
        assert shards > 1 and p["documents"] == 5 and p["tokens"] == sum(lengths) and p["longest"] == 1500
        want = p["disk"]
        begins = 8 * shards  # the last entry of each begin array is planned with the tables
        assert want["keys"] == got["keys"] and want["hidden"] == got["hidden"], (want, got)
        assert want["stats"] == max(0, got["stats"] - 3 * begins), (want, got)
        assert 0.15 * want["votes"] < got["votes"] - begins <= want["votes"], (want, got)
        assert 0.1 * want["dense"] <= got["dense"] <= want["dense"] + 3 * begins, (want, got)
        assert total <= p["disk_bytes"] <= 4 * total, (p["disk_bytes"], total)
        print(f"{options[6:]}: {shards} shards of {total} bytes, planned {p['disk_bytes']}")


def against_memory():
    tokens = documents([4000, 2500])
    options = ["--teacher", TEACHER, "--tokens", tokens, "--shard-bytes", "8M"]
    p, _ = plan(*options)
    pid = os.fork()  # a child of its own: ru_maxrss of children is a maximum over all of them
    if pid == 0:
        lsa("run", *options, "--out", f"{work}/m")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        open(f"{work}/peak", "w").write(str(peak))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    peak = int(open(f"{work}/peak").read())
    print(f"host memory: peak {peak / 2**20:.0f} MiB, planned at most {p['host_bytes'] / 2**20:.0f} MiB")
    if b"__asan_init" not in open(f"{BIN}/lsa-dump", "rb").read() and b"__tsan_init" not in open(f"{BIN}/lsa-dump", "rb").read():
        assert p["host_bytes"] / 2.5 < peak <= p["host_bytes"]
    assert p["tokens_per_s"] > 0 and p["seconds"] > 0


def geometries():
    huge = ["--host-budget", "65536G"]
    p, _ = plan("--teacher", FLASH, "--lengths", "1x65536", *huge)
    assert abs(p["parameters"] / 284.33e9 - 1) < 1e-4 and p["tokens_per_s"] == 0 and p["seconds"] == 0
    assert p["disk"]["keys"] == 693 * 65536  # bytes per token of all 21 layers, architecture notes 13.3
    assert p["disk"]["hidden"] == 1024 * (21 * 4096 * 2 + 8)
    entries = sum(min(512, (t + 1) // 4) for t in range(65536))
    assert p["disk"]["stats"] == 21 * (8 * entries + 12 * 65536)
    assert p["host"]["weights"] > 4 * 284.3e9
    pro, _ = plan("--teacher", PRO, "--lengths", "1x65536", *huge)
    assert abs(pro["parameters"] / 1573.0e9 - 1) < 1e-4 and pro["disk"]["keys"] == 990 * 65536
    assert pro["flops"] > 3 * p["flops"]

    # DSpark drafter: more ratios than layers; a config with nothing but config.json needs no weights
    config = json.load(open(f"{FLASH}/config.json"))
    config["compress_ratios"] += [0, 0]
    config["dspark_block_size"] = 5
    os.makedirs(f"{work}/dspark")
    json.dump(config, open(f"{work}/dspark/config.json", "w"))
    again, _ = plan("--teacher", f"{work}/dspark", "--lengths", "1x65536", *huge)
    assert again["weight_bytes"] == p["weight_bytes"]
    # weights that are still being fetched do not stand in the way
    json.dump({"weight_map": {"embed.weight": "model-00001-of-00046.safetensors"}}, open(f"{work}/dspark/model.safetensors.index.json", "w"))
    _, err = plan("--teacher", f"{work}/dspark", "--lengths", "1x65536", *huge)
    assert "the speed is not measured" in err and "1 of 1 weight files" in err, err

    # what a layer-streamed pass has to do, by formulas written out here once more
    n, budget = 300, 96 * GIB
    s = plan("--teacher", FLASH, "--lengths", f"{n}x65536", "--host-budget", "96G", code=4)[0]
    x, wave = s["streamed"], budget // (4 * 4096 * 4)
    assert x["in_this_version"] == 1 and x["wave_tokens"] == wave and x["passes"] == math.ceil(n / (wave // 65536))
    assert x["bus_bytes"] == float("%.9g" % (x["passes"] * s["weight_bytes"] + 43 * 2 * 65536 * n * 65536))
    assert plan("--teacher", FLASH, "--lengths", "1x1048576", "--host-budget", "16G", code=4)[0]["streamed"]["passes"] == 0
    text = subprocess.run([f"{BIN}/lsa-dump", "plan", "--teacher", FLASH, "--lengths", "1x1000", *huge], capture_output=True, text=True).stdout
    assert "--stream: weights pass" in text and "time       unknown" in text, text


def refusals():
    _, err = plan("--teacher", FLASH, "--lengths", "2x4096", "--host-budget", "512G", code=4)
    assert "the weights alone take 1059" in err and "--device cuda --stream" in err, err

    # host memory: each advice fits, and a little less of it does not
    args = ["--teacher", TEACHER, "--lengths", "3x200000,2x100000", "--shard-bytes", "1G"]
    budget = int(plan(*args, "--host-budget", "65536G")[0]["host_bytes"] * 0.7)
    _, err = plan(*args, "--host-budget", str(budget), code=4)
    shard, longest = re.search(r"--shard-bytes (\d+)K", err), re.search(r"documents of at most (\d+) tokens", err)
    assert "--no-stats" in err and longest, err
    plan(*args, "--host-budget", str(budget), "--no-stats")
    n = int(longest[1])
    args[3] = f"3x{n},2x{min(n, 100000)}"
    plan(*args, "--host-budget", str(budget))
    args[3] = f"3x{n + 1},2x{min(n + 1, 100000)}"
    plan(*args, "--host-budget", str(budget), code=4)
    args[3] = "3x200000,2x100000"
    if shard:
        plan(*args, "--host-budget", str(budget), "--shard-bytes", shard[1] + "K")
    # run refuses before weights are read and leaves nothing
    tokens = documents([500])
    out, err = lsa("run", "--teacher", TEACHER, "--tokens", tokens, "--out", f"{work}/no", "--host-budget", "40M", code=4)
    assert "a machine with more memory" in err and not os.path.exists(f"{work}/no"), err

    # disk: many documents on whatever is free here
    free = plan("--teacher", TEACHER, "--lengths", "1x8192", "--out", work)[0]["disk_free"]
    p, _ = plan("--teacher", TEACHER, "--lengths", "10x8192", "--out", work)
    count = int(1.5 * free / (p["disk_bytes"] / 10))
    _, err = plan("--teacher", TEACHER, "--lengths", f"{count}x8192", "--out", work, "--host-budget", "65536G", code=4)
    first = re.search(r"the first (\d+) of (\d+) --documents", err)
    assert first and int(first[2]) == count and 0.6 < int(first[1]) / count < 0.75 and "--no-stats" in err, err
    lsa("plan", "--teacher", TEACHER, "--lengths", f"{int(int(first[1]) * 0.95)}x8192", "--out", work, "--host-budget", "65536G")

    for bad in ("", "3", "3x", "x4", "0x5", "5x0", "-1x5", "3x5,", "3x5;4x6", "3x99999999999", "200000000x1"):
        assert "COUNTxTOKENS" in lsa("plan", "--teacher", FLASH, "--lengths", bad, code=2)[1], bad
    lsa("plan", "--teacher", FLASH, code=2)
    lsa("plan", "--teacher", FLASH, "--lengths", "1x5", "--tokens", tokens, code=2)
    lsa("plan", "--teacher", FLASH, "--lengths", "1x5", "--documents", "0:1", code=2)
    lsa("plan", "--teacher", f"{work}/none", "--lengths", "1x5", code=1)


try:
    against_dumps()
    against_memory()
    geometries()
    refusals()
    print("ok")
finally:
    shutil.rmtree(work, ignore_errors=True)
