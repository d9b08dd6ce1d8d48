#!/usr/bin/env python3
"""Documents of the FlashMemory dump without torch: Python's own pickler makes what pickle.dump makes of a dict of torch tensors (protocol
4; every storage is the bytes of torch's older stream: magic number, version, sizes of types, storage, keys, count, numbers).
Its bytes are those of torch 2.5.1 but for the addresses that name storages, and torch reads them. Shares no code with data/pickle.c.

  flashmemory_pickle.py FOLDER N    N documents
  flashmemory_pickle.py FOLDER -    FOLDER/0, FOLDER/1, ... of two documents each, one for each line of the input: a statement that is
                                    run with the dict of the second as `d` before it is written

Topics: chunk c has topic (c * 5 + c // 7) % 8, token t asks for topic (t // 64) % 8: its hidden vector says so, and it is
labelled with the chunks of that topic which are complete. The model has 3 CSA layers (1, 3, 5) and hidden width 64 (config.json in FOLDER/model)."""
import collections
import io
import json
import os
import pickle
import struct
import sys
import types

import numpy as np

STORAGE = {"bf16": "BFloat16Storage", "<f4": "FloatStorage", "<i4": "IntStorage", "<i8": "LongStorage", "|u1": "ByteStorage"}
HIDDEN, PROMPT, TOKENS, LAYERS = 64, 254, 160, (0, 2)


class BF16:
    """bits: u16 array"""

    def __init__(self, bits):
        self.bits = bits


def bf16(x):
    u = np.ascontiguousarray(x, "<f4").view("<u4").astype(np.uint64)
    return BF16(((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2"))


def fake_torch():
    torch, storage, utils = types.ModuleType("torch"), types.ModuleType("torch.storage"), types.ModuleType("torch._utils")
    for name in STORAGE.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for module, name in ((storage, "_load_from_bytes"), (utils, "_rebuild_tensor_v2")):

        def f(*args):
            raise AssertionError("only its name is pickled")

        f.__module__, f.__name__, f.__qualname__ = module.__name__, name, name
        setattr(module, name, f)
    torch.storage, torch._utils = storage, utils
    return {"torch": torch, "torch.storage": storage, "torch._utils": utils}


def stream(torch, kind, raw, numel, little=True, key="94318772913152", inner=None, keys=1):
    """The bytes of one storage; inner: another object in its place."""

    class Storage:
        pass

    class Writer(pickle.Pickler):
        def persistent_id(self, o):
            return ("storage", getattr(torch, kind), key, "cpu", numel, None) if isinstance(o, Storage) else None

    b = io.BytesIO()
    pickle.dump(0x1950A86A20F9469CFC6C, b, protocol=2)
    pickle.dump(1001, b, protocol=2)
    pickle.dump({"protocol_version": 1001, "little_endian": little, "type_sizes": {"short": 2, "int": 4, "long": 4}}, b, protocol=2)
    Writer(b, protocol=2).dump(Storage() if inner is None else inner)
    pickle.dump([key] * keys, b, protocol=2)
    b.write(struct.pack("<q", numel) + raw)
    return b.getvalue()


def dumps(d, protocol=4, **odd):
    """Bytes of a dict: numpy arrays and BF16 as tensors, everything else as it is. odd: see stream()."""
    modules = fake_torch()
    torch = modules["torch"]

    class TypedStorage:
        def __init__(self, x):
            self.x = x

        def __reduce__(self):
            bits = self.x.bits if isinstance(self.x, BF16) else self.x
            kind = STORAGE["bf16" if isinstance(self.x, BF16) else bits.dtype.str]
            return torch.storage._load_from_bytes, (stream(torch, kind, bits.tobytes(), bits.size, **odd),)

    class Tensor:
        def __init__(self, x):
            self.x = x

        def __reduce__(self):
            bits = self.x.bits if isinstance(self.x, BF16) else self.x
            stride = tuple(s // bits.itemsize for s in np.ascontiguousarray(bits).strides)
            return torch._utils._rebuild_tensor_v2, (TypedStorage(self.x), 0, tuple(bits.shape), stride, False, collections.OrderedDict())

    saved = {m: sys.modules.get(m) for m in modules}
    sys.modules.update(modules)
    try:
        return pickle.dumps({k: Tensor(v) if isinstance(v, (np.ndarray, BF16)) else v for k, v in d.items()}, protocol=protocol)
    finally:
        for m, old in saved.items():
            sys.modules.pop(m) if old is None else sys.modules.__setitem__(m, old)


def e4m3(x):
    """Nearest code of |x| <= 448, by search in the table of all values."""
    codes = np.array([c for c in range(256) if c & 127 != 127], np.int64)
    e, m = (codes >> 3) & 15, codes & 7
    values = np.where(codes & 128, -1.0, 1.0) * np.where(e == 0, m / 8 * 2.0**-6, (1 + m / 8) * 2.0 ** (e - 7))
    order = np.argsort(values, kind="stable")
    at = np.clip(np.searchsorted(values[order], x), 1, len(order) - 1)
    low, high = values[order][at - 1], values[order][at]
    return codes[order][np.where(np.abs(x - low) <= np.abs(high - x), at - 1, at)].astype(np.uint8)


def hadamard(x):
    h = np.ones((1, 1))
    while len(h) < 128:
        h = np.block([[h, h], [h, -h]])
    return x @ h / np.sqrt(128)


def document(seed, tokens=TOKENS, prompt=PROMPT):
    rng, world = np.random.default_rng(seed), np.random.default_rng(77)
    topics = world.normal(size=(8, HIDDEN)), {l: world.normal(size=(8, 128)) for l in range(3)}
    n = (prompt + tokens) // 4
    chunk_topic = np.array([(c * 5 + c // 7) % 8 for c in range(n)])
    position = np.arange(prompt, prompt + tokens)
    d = {}
    for l in LAYERS:
        key = topics[1][l][chunk_topic] + 0.05 * rng.normal(size=(n, 128))
        key[:, 64:] = 0  # nothing in the rotary channels
        key = hadamard(key)
        scale = np.maximum(1e-4, np.abs(key).max(1)) / 448
        d[f"hidden_layer_{l}"] = bf16(topics[0][(position // 64) % 8] + 0.05 * rng.normal(size=(tokens, HIDDEN)))
        d[f"positions_layer_{l}"] = position.astype("<i8")
        d[f"compk_layer_{l}"] = np.concatenate([e4m3(key / scale[:, None]), scale.astype("<f4").view(np.uint8).reshape(n, 4)], 1)
    index, score, pointer = [], [], [0]
    for t in position:
        golden = [c for c in range((t + 1) // 4) if chunk_topic[c] == (t // 64) % 8 and rng.random() < 0.9]
        rng.shuffle(golden)  # the dump sorts by votes, not by chunk
        index += golden
        score += [3] * len(golden)
        pointer.append(len(index))
    d["label_indices"], d["label_scores"], d["label_pointers"] = (np.array(x, "<i4") for x in (index, score, pointer))
    for i in range(3):
        d[f"logits_layer_{LAYERS[0]}_token_{i}"] = bf16(rng.normal(size=(prompt + i + 1) // 4))
        d[f"weights_layer_{LAYERS[0]}_token_{i}"] = bf16(rng.normal(size=(1, 8, 1)))
    return d


def model(folder):
    c = json.load(open("recipes/mini/teacher/config.json"))
    c["hidden_size"] = HIDDEN
    os.makedirs(folder, exist_ok=True)
    json.dump(c, open(f"{folder}/config.json", "w"))


def write(folder, n, statement="", **odd):
    os.makedirs(folder, exist_ok=True)
    for i in range(n):
        d = document(i)
        options = dict(odd) if i == n - 1 else {}
        if statement and i == n - 1:
            exec(statement, {"d": d, "np": np, "bf16": bf16, "options": options, "document": document, "os": os})
        open(f"{folder}/doc_{i:05d}.pkl", "wb").write(dumps(d, **options))


if __name__ == "__main__":
    if sys.argv[2] == "-":
        for number, statement in enumerate(sys.stdin):
            write(f"{sys.argv[1]}/{number}", 2, statement)
    else:
        write(sys.argv[1], int(sys.argv[2]))
    model(f"{sys.argv[1]}/model")
