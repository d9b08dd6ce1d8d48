#!/usr/bin/env python3
"""Proves that an engine reads an exported indexer as it was trained; run it at every load (as a script: checks its own arithmetic). numpy only.
check(folder, score, path) calls score(ordinal, hidden f32 [d], position, key_rows u8 [n, 132]) -> logits [n], or (logits, q [heads, 128]).
path: "f32", "bf16" or "fp8", the numeric path of the engine's queries. Raises ValueError that names the convention at fault (EXPORT_FORMAT.md of lsa). Logits only: no ensemble, no continuation."""
import functools, json, math, os, sys, zlib
import numpy as np
LIMIT = {"f32": 4e-5, "bf16": 1e-3, "fp8": 1e-2}  # of |found - expected| / |expected| over the numbers of one query
LOW = [1 + 2.0**-10, 1 - 2.0**-10]  # gives hidden vectors low bits, which an engine has to round away
TYPE = {"F32": "<f4", "I32": "<i4", "I64": "<i8", "U8": "u1", "F8_E4M3": "u1", "BF16": "<u2"}
RIGHT = dict(hadamard=128**-0.5, halves=0, first=0, turn=1, magnitude=0, double=0, shift=0, rows=1 << 40, transposed=0, again=0, low_bits=0, q_norm=3,
             relu=1, key_scale=1)
HADAMARD, C = functools.reduce(np.kron, [[[1.0, 1], [1, -1]]] * 7), np.arange(256)
E4M3 = np.where(C & 128, -1, 1) * np.where(C >> 3 & 15, (8 + C % 8) * 2.0 ** ((C >> 3 & 15) - 10), C % 8 * 2.0**-9)
def bf16(x):
    return np.ldexp(np.round(np.frexp(x)[0] * 256), np.frexp(x)[1] - 8)
def read(path, crc=None):  # tensors and metadata
    raw = np.fromfile(path, np.uint8)
    n = 8 + int(raw[:8].view("<u8")[0])
    head, data = json.loads(raw[8:n].tobytes()), raw[n:]
    meta = head.pop("__metadata__", {})
    said = crc or meta.get("file_crc32", "")  # a file's own is that of the file with zeros in its place
    if not crc and meta.get("lsa.format") != "lsa-golden/2":
        raise ValueError(f"{path}: golden vectors of another version ({meta.get('lsa.format')}); export again")
    if format(zlib.crc32(raw if crc else raw.tobytes().replace(said.encode(), b"0" * 8, 1)), "08x") != said:
        raise ValueError(f"{path}: changed or damaged, or not the file that golden.safetensors was made from; export again")
    cut = {k: data[slice(*t["data_offsets"])].view(TYPE[t["dtype"]]).reshape(t["shape"]) for k, t in head.items()}
    return {k: (v.astype("<u4") << 16).view("<f4") if head[k]["dtype"] == "BF16" else v for k, v in cut.items()}, meta
def logits(W, c, x, pos, key):  # [m, n], and queries [m, H, 128], of hidden vectors [m, d] under the settings c
    dim, H, f = c["dim"], len(W["weights_proj.weight"]), float if c["double"] == 2 else np.float32
    x = x * np.resize(LOW, x.shape[1]) if c["low_bits"] else x
    x = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6) if c["again"] else x
    a = x @ W["wq_a.weight"].T
    a = a if c["q_norm"] in (0, 2) else a / np.sqrt((a * a).mean(1, keepdims=True) + c["eps"])
    q = (a * W["q_norm_weight"] if c["q_norm"] > 1 else a) @ W["wq_b.weight"].T
    q = q.reshape(-1, 128, H).swapaxes(1, 2).copy() if c["transposed"] else q.reshape(-1, H, 128)
    q, i, log = q if c["path"] == "f32" else bf16(q), np.arange(dim // 2), math.log(c["base"])
    lo, hi = (dim * math.log(c["original_len"] / (2 * math.pi * c[b])) / (2 * log) for b in ("beta_fast", "beta_slow"))
    lo, hi = max(math.floor(lo), 0), min(math.ceil(hi), dim - 1)
    ramp, freq = np.clip((i - lo) / (hi - lo or 1e-3), 0, 1).astype(f), 1 / (c["base"] ** (2 * i / dim)).astype(f)
    freq = freq if c["factor"] == 1 else freq / f(c["factor"]) * ramp + freq * (1 - ramp)
    at = np.minimum(pos + c["shift"], c["rows"] - 1).astype(float if c["double"] else np.float32)[:, None, None]
    angle, gain = (at * freq).astype(float) * c["turn"], 0.1 * math.log(c["factor"]) + 1 if c["magnitude"] else 1
    i = (0 if c["first"] else 128 - dim) + (i if c["halves"] else 2 * i)
    j, cos, sin = i + (dim // 2 if c["halves"] else 1), np.cos(angle) * gain, np.sin(angle) * gain
    q[..., i], q[..., j] = q[..., i] * cos - q[..., j] * sin, q[..., i] * sin + q[..., j] * cos
    q = q if c["path"] == "f32" else bf16(q)
    q = q @ HADAMARD * c["hadamard"] if c["hadamard"] else q
    if c["path"] == "fp8":
        scale = np.maximum(1e-4, np.abs(q).max(2, keepdims=True)) / 448
        step = 2.0 ** (np.maximum(np.frexp(q / scale)[1], -5) - 4) * scale
        q = np.clip(np.round(q / step) * step, -448 * scale, 448 * scale)
    dot = q @ (E4M3[key[:, :128]] * (key[:, 128:].copy().view("<f4") if c["key_scale"] else 1)).T
    return np.einsum("mh,mhn->mn", x @ W["weights_proj.weight"].T * c["scale"], np.maximum(dot, 0) if c["relu"] else dot), q
def check(folder, score, path="f32"):  # returns the largest difference
    G, meta = read(f"{folder}/golden.safetensors")
    weights, about = read(f"{folder}/indexer.safetensors", meta["indexer_crc32"])
    g, pos, table, worst = json.loads(about["lsa.geometry"]), G["position"], json.loads(G["conventions"].tobytes()), 0
    right = dict(RIGHT, **g["rope"], eps=g["eps"], path=path, scale=(128 * g["n_head"]) ** -0.5)
    def ours(l, setting=None, v=None):  # logits and q of layer l, with one wrong setting
        w, x, k = (v[1] if setting == "layer" and part in v[0] else l for part in ("weights", "hidden", "keys"))
        W = {n.split(".", 2)[2]: (E4M3[t] * weights[n + "_scale"] if n + "_scale" in weights else t).astype(float) for n, t in weights.items() if f"s.l{w}." in n}
        return logits(W, {**right, setting: v}, G[f"l{x}.hidden"].astype(float), pos, G[f"l{k}.key"])
    def off(got, want):  # largest difference of a query; NaN if a number is
        pairs = [(a.reshape(len(pos), -1), b.reshape(len(pos), -1)) for a, b in zip(got, want)]
        return np.max([np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1) for a, b in pairs])
    for l in (layer["ordinal"] for layer in g["layers"]):
        got = [score(l, (x * np.resize(LOW, len(x))).astype("<f4"), int(p), G[f"l{l}.key"]) for x, p in zip(G[f"l{l}.hidden"], pos)] if score else [ours(l)]
        got = [np.array(v, float) for v in zip(*(v if isinstance(v, tuple) else (v,) for v in got))]
        d = off(got, [G[f"l{l}.logit" if path == "f32" else f"l{l}.{path}.logit"].astype(float), ours(l)[1] if len(got) > 1 else 0])
        worst = max(d, worst)
        if not d <= LIMIT[path]:
            tries = [(off(got, ours(l, setting, v)) / max(LIMIT[path], LIMIT.get(str(v), 0)), f"{name}: {text}", f" ({setting} {v})")
                     for name, text, setting, values in table for v in values]
            names = {t[1]: t[2] for t in tries if t[0] <= min(1, 3 * min(t[0] for t in tries) + 0.05)}
            why = "; or ".join(map("".join, names.items())) or "no convention of the table explains it; lsa-export verify --against tells the stage"
            raise ValueError(f"{folder}: layer c{l} is off by {d:.3g} (limit {LIMIT[path]:g}): {why}")
    return worst
if __name__ == "__main__":
    for path in LIMIT:
        print(path, "agrees within", check(sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__)), None, path))
