#!/usr/bin/env python3
"""Pickles and engine responses into shards: every value arrives, the shards verify, and an indexer learns from them."""
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile

import h5py
import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, "tests/testkit")
import flashmemory_pickle as fm

BIN = os.environ["LSA_BIN"]
work = tempfile.mkdtemp(prefix="lsa-import-")


def run(program, *args, code=0):
    p = subprocess.run([f"{BIN}/{program}", *args], capture_output=True, text=True)
    if p.returncode != code:
        sys.exit(f"{program} {' '.join(args)}: exit {p.returncode}, expected {code}\n{p.stderr}")
    return p.stdout + p.stderr


def read(folder):
    """Documents of a shard folder, by plain h5py: name -> columns."""
    manifest, docs = json.load(open(f"{folder}/manifest.json")), {}
    assert manifest["complete"] and not manifest["has_stats"]
    for shard in manifest["shards"]:
        with h5py.File(f"{folder}/{shard['file']}") as f:
            row, key, hidden_row = f["docs/row_begin"][:], f["docs/key_begin"][:], f["hidden/row"][:]
            begin, chunk, votes = f["labels/begin"][:], f["labels/chunk"][:], f["labels/votes"][:]
            assert "stats" not in f and "probe" not in f
            for i, name in enumerate(f["docs/name"][:]):
                rows = slice(row[i], row[i + 1])
                inside = (hidden_row >= row[i]) & (hidden_row < row[i + 1])
                docs[name.decode()] = {
                    "tokens": f["docs/n_tokens"][i], "hash": int(f["docs/token_xxh64"][i]), "position": f["rows/position"][rows], "visible": f["rows/visible"][rows],
                    "hidden_at": f["rows/position"][:][hidden_row[inside]],
                    "hidden": {o: f[f"hidden/{o}"][:][inside] for o in f["hidden"] if o != "row"},
                    "keys": {o: f[f"keys/{o}"][key[i] : key[i + 1]] for o in f.get("keys", ())},
                    "labels": [sorted(zip(chunk[a:b].tolist(), votes[a:b].tolist())) == list(zip(chunk[a:b].tolist(), votes[a:b].tolist())) and
                               dict(zip(chunk[a:b].tolist(), votes[a:b].tolist())) for a, b in zip(begin[rows], begin[row[i] + 1 : row[i + 1] + 1])]}
    return manifest, docs


def same(got, d, stride=1, prompt=fm.PROMPT):
    """A document of the shards against the dict that was pickled."""
    tokens = len(d["positions_layer_0"])
    assert got["tokens"] == prompt + tokens and got["hash"] == 0
    assert np.array_equal(got["position"], d["positions_layer_0"]) and np.array_equal(got["visible"], (got["position"] + 1) // 4)
    on = (got["position"] + 1) % stride == 0
    assert np.array_equal(got["hidden_at"], got["position"][on]) and set(got["hidden"]) == set(got["keys"]) == {f"c{o}" for o in fm.LAYERS}
    for o in fm.LAYERS:
        assert np.array_equal(got["hidden"][f"c{o}"], d[f"hidden_layer_{o}"].bits[on])
        assert np.array_equal(got["keys"][f"c{o}"], d[f"compk_layer_{o}"])
    p = d["label_pointers"]
    for t in range(tokens):
        assert got["labels"][t] == dict(zip(d["label_indices"][p[t] : p[t + 1]].tolist(), d["label_scores"][p[t] : p[t + 1]].tolist())), t


def pickles():
    fm.model(f"{work}/model")
    fm.write(f"{work}/a", 6)
    fm.write(f"{work}/b", 3, "d.update(document(50, tokens=96, prompt=119))")
    args = ["--from", f"{work}/a", "--from", f"{work}/b", "--teacher", f"{work}/model"]
    text = run("lsa-dump", "import", *args, "--out", f"{work}/shards", "--shard-bytes", "100K")
    for needle in ("not in the source: native logits", "2 of the model's 3 CSA layers", "sample.min_layers 3"):
        assert needle in text, (needle, text)
    run("lsa-dump", "verify", f"{work}/shards")
    info = run("lsa-dump", "info", f"{work}/shards")
    assert "at least 3" in info and "hidden vectors: attn_norm" in info and "c1=3 (votes only)" in info, info
    manifest, docs = read(f"{work}/shards")
    assert list(docs) == [f"{s}/doc_{i:05d}" for s, n in (("a", 6), ("b", 3)) for i in range(n)] and len(manifest["shards"]) > 2
    assert [(x["ordinal"], x["id"], x["keys"]) for x in manifest["layers"]] == [(0, 1, True), (1, 3, False), (2, 5, True)]
    assert manifest["labels"] == {"top_p": 0.6, "pool": 64, "min_votes": 3} and manifest["hidden"] == 64 and manifest["hidden_stride"] == 1
    assert manifest["rope"]["original_len"] == 4096
    for i in range(6):
        same(docs[f"a/doc_{i:05d}"], fm.document(i))
    odd = fm.document(2)
    odd.update(fm.document(50, tokens=96, prompt=119))
    same(docs["b/doc_00002"], odd, prompt=119)
    run("lsa-dump", "import", *args, "--out", f"{work}/thin", "--hidden-stride", "64")
    run("lsa-dump", "verify", f"{work}/thin")
    _, thin = read(f"{work}/thin")
    same(thin["a/doc_00004"], fm.document(4), stride=64)
    for protocol in (3, 5):  # other protocols of pickle.dump, the same shards
        fm.write(f"{work}/p{protocol}/a", 1, protocol=protocol)
        run("lsa-dump", "import", "--from", f"{work}/p{protocol}/a", "--teacher", f"{work}/model", "--out", f"{work}/p{protocol}s")
        same(read(f"{work}/p{protocol}s")[1]["a/doc_00000"], fm.document(0))
    print(f"pickles: {len(docs)} documents, every value")


def resume():
    """A bad file in the middle: shards before it stay, resume goes on once it is repaired, to the same bytes."""
    path = f"{work}/a/doc_00003.pkl"
    good = open(path, "rb").read()
    open(path, "wb").write(good[: len(good) // 2])
    args = ["--from", f"{work}/a", "--from", f"{work}/b", "--teacher", f"{work}/model", "--shard-bytes", "100K"]
    assert "doc_00003" in run("lsa-dump", "import", *args, "--out", f"{work}/again", code=3)
    manifest = json.load(open(f"{work}/again/manifest.json"))
    assert not manifest["complete"] and sum(s["documents"] for s in manifest["shards"]) <= 3 and manifest["shards"]
    run("lsa-dump", "verify", f"{work}/again")
    assert "doc_00003" in run("lsa-dump", "resume", f"{work}/again", code=3)
    text = run("lsa-dump", "import", *args, "--out", f"{work}/skipped", "--skip-bad")
    assert "left out: " in text and "1 documents left out" in text
    run("lsa-dump", "verify", f"{work}/skipped")
    assert "a/doc_00003" not in read(f"{work}/skipped")[1]
    open(path, "wb").write(good)
    run("lsa-dump", "resume", f"{work}/again")
    for name in sorted(os.listdir(f"{work}/shards")):
        if name.endswith(".h5"):
            assert open(f"{work}/shards/{name}", "rb").read() == open(f"{work}/again/{name}", "rb").read(), name
    assert json.load(open(f"{work}/shards/manifest.json")) == json.load(open(f"{work}/again/manifest.json"))
    print("resume: the same bytes")


def f1(name, recipe, shards, *more):
    run("lsa-train", "run", "--recipe", recipe, "--data", f"{work}/{shards}", "--out", f"{work}/{name}", "--device", "cpu", *sum((["--set", x] for x in (
        "model.heads=8", "model.rank=16", "train.batch=16", "train.steps=60", "train.eval_every=60", "train.save_every=60", "sample.val_documents=2", *more)), []))
    text = run("lsa-train", "eval", f"{work}/{name}", "--data", f"{work}/{shards}", "--held-out", "--device", "cpu", "--json")
    return json.loads(text[text.index("{") : text.rindex("}") + 1])["mean"]["f1"]


def training():
    """Held-out documents: the golden chunks of their windows are found, which an untrained indexer does not."""
    votes = "loss.kind=focal", "loss.on=layer", "eval.metric=f1", "sample.min_layers=3", "window.tail=64"
    for name, *args in (("reference", "recipes/reference.yaml", "shards"), ("lookahead", "recipes/smoke.yaml", "thin", *votes)):
        before, after = f1(f"{name}0", *args, "train.steps=1", "optim.lr=0"), f1(name, *args, "optim.lr=1e-2")
        print(f"training, {name}: f1 {before:.3f} -> {after:.3f}")
        assert before <= 0.45 and after >= 0.62

    def refused(text, *args):
        out = run("lsa-train", "run", "--data", f"{work}/shards", "--out", f"{work}/no", "--device", "cpu", "--recipe", *args, code=2)
        assert text in out and out.count("error:") == 1, out

    refused("hold no /stats", "recipes/smoke.yaml", "--set", "sample.min_layers=3")
    refused("at least 3 votes", "recipes/reference.yaml", "--set", "sample.min_layers=2")


def responses():
    """What engines return: selections of SGLang, hidden states of vLLM, keys from somewhere else; then votes and no keys."""
    rng, rows, k = np.random.default_rng(3), 72, 5
    os.makedirs(f"{work}/resp")
    lines, truth = [], {}
    for i in range(3):
        first = (0, 9, 40)[i]
        n = first + rows
        topk = np.full((rows, 3, k), -1, np.int32)
        for t in range(rows):
            for o in range(3):
                c = rng.permutation((first + t + 1) // 4)[:k]
                topk[t, o, : len(c)] = c
        meta = json.loads(json.dumps({"indexer_topk": base64.b64encode(topk.tobytes()).decode()}))  # what SGLang answers
        topk = np.frombuffer(base64.b64decode(meta["indexer_topk"]), np.int32).reshape(-1, 3, k)
        hidden = rng.normal(size=(rows, 3, fm.HIDDEN)).astype(np.float32)
        ids = rng.integers(0, 2048, n)
        keys = {f"index_keys.{o}": np.concatenate([rng.integers(0, 120, (n // 4, 128)).astype(np.uint8), np.full((n // 4, 1), 0.5, np.float32).view(np.uint8)], 1) for o in (0, 2)}
        save_file({"indexer_topk": topk, "token_ids": ids.astype(np.int32)}, f"{work}/resp/{i}.topk.safetensors")
        save_file({"hidden_states": hidden, "token_ids": ids, **keys}, f"{work}/resp/{i}.hidden.safetensors")
        lines.append({"format": "lsa-import/1", "name": f"request-{i}", "source": "test", "tensors": [f"{i}.topk.safetensors", f"{i}.hidden.safetensors"], "first": first,
                      "layers": [{"ordinal": 2, "id": 5}, None, {"ordinal": 0, "id": 1}], "hidden": "attn_norm"})
        truth[f"request-{i}"] = (first, topk, {2: hidden[:, 0], 0: hidden[:, 2]}, keys)
    open(f"{work}/resp/documents.jsonl", "w").write("\n".join(map(json.dumps, lines)) + "\n\n")
    run("lsa-dump", "import", "--from", f"{work}/resp/documents.jsonl", "--teacher", f"{work}/model", "--out", f"{work}/engine")
    run("lsa-dump", "verify", f"{work}/engine")
    manifest, docs = read(f"{work}/engine")
    assert manifest["labels"] == {"top_p": 1.0, "pool": k} and [x["keys"] for x in manifest["layers"]] == [True, False, True]
    assert list(docs) == list(truth) and all(d["hash"] for d in docs.values())
    for name, (first, topk, hidden, keys) in truth.items():
        d = docs[name]
        assert d["tokens"] == first + rows and d["position"][0] == first
        for o in (0, 2):
            assert np.array_equal(d["hidden"][f"c{o}"], fm.bf16(hidden[o]).bits) and np.array_equal(d["keys"][f"c{o}"], keys[f"index_keys.{o}"])
        for t in range(rows):
            chunks, votes = np.unique(topk[t][topk[t] >= 0], return_counts=True)
            assert d["labels"][t] == dict(zip(chunks.tolist(), votes.tolist()))
    # votes as CSR, and neither keys nor hidden vectors: shards of votes, which training refuses
    save_file({"label_begin": np.array([0, 1, 3]), "label_chunk": np.array([1, 0, 2], np.int32), "label_votes": np.array([1, 3, 2], np.uint8)}, f"{work}/resp/v.safetensors")
    open(f"{work}/resp/votes.jsonl", "w").write(json.dumps({"format": "lsa-import/1", "name": "v", "tensors": "v.safetensors", "first": 10}))
    text = run("lsa-dump", "import", "--from", f"{work}/resp/votes.jsonl", "--teacher", f"{work}/model", "--out", f"{work}/votes", "--min-votes", "1")
    assert "votes only and cannot be trained on" in text, text
    run("lsa-dump", "verify", f"{work}/votes")
    assert read(f"{work}/votes")[1]["v"]["labels"] == [{1: 1}, {0: 3, 2: 2}]
    assert "hold keys of" in run("lsa-train", "run", "--recipe", "recipes/reference.yaml", "--data", f"{work}/votes", "--out", f"{work}/no", "--device", "cpu", code=2)
    # with the weights at hand, the shards are known as those of the same teacher
    open(f"{work}/short.jsonl", "w").write(json.dumps({"tokens": list(range(1, 41))}))
    run("lsa-dump", "run", "--teacher", "recipes/mini/teacher", "--tokens", f"{work}/short.jsonl", "--out", f"{work}/dumped")
    run("lsa-dump", "import", "--from", f"{work}/resp/votes.jsonl", "--teacher", "recipes/mini/teacher", "--out", f"{work}/known", "--min-votes", "1")
    assert read(f"{work}/known")[0]["teacher"] == json.load(open(f"{work}/dumped/manifest.json"))["teacher"] != read(f"{work}/votes")[0]["teacher"]
    # hidden vectors without keys, as vLLM alone gives them: said, and left out
    line = dict(lines[0], tensors=["0.topk.safetensors", "plain.safetensors"], hidden="layer_output")
    save_file({"hidden_states": np.ones((rows, 3, fm.HIDDEN), np.float32)}, f"{work}/resp/plain.safetensors")
    open(f"{work}/resp/plain.jsonl", "w").write(json.dumps(line))
    text = run("lsa-dump", "import", "--from", f"{work}/resp/plain.jsonl", "--teacher", f"{work}/model", "--out", f"{work}/plain")
    assert "without index keys were left out" in text and "layer_output" not in text, text
    line["tensors"].append("1.keys.safetensors")
    save_file(truth["request-0"][3], f"{work}/resp/1.keys.safetensors")
    open(f"{work}/resp/plain.jsonl", "w").write(json.dumps(line))
    text = run("lsa-dump", "import", "--from", f"{work}/resp/plain.jsonl", "--teacher", f"{work}/model", "--out", f"{work}/output")
    assert "'layer_output', not the attention input" in text, text
    assert "hidden vectors: layer_output" in run("lsa-dump", "info", f"{work}/output")
    print(f"responses: {len(docs)} documents, every value")


try:
    pickles()
    resume()
    training()
    responses()
finally:
    shutil.rmtree(work, ignore_errors=True)
