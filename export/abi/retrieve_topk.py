#!/usr/bin/env python3
"""liblsa_indexer from Python by ctypes, shaped as an SGLang-style `retrieve_topk`.

On a CPU handle every array is numpy. On a CUDA handle every array is a contiguous torch tensor on that device and
`new` makes them there; the code is the same, because both are only asked for their address:

    indexer = Indexer(folder, device="cuda:0", path=FP8, max_batch=64, max_chunks=262144,
                      new=lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype), device="cuda:0"),
                      stream=lambda: torch.cuda.current_stream().cuda_stream)

hidden is torch.bfloat16 then (as uint16 in numpy, which has no bfloat16), and the results are tensors too: a call
only launches, so read them after a synchronisation, or use them on the same stream. Every array that a call makes is
made before the launches; inside a CUDA graph capture torch's allocator keeps them alive with the graph.

    retrieve_topk.py INDEXER [LIBRARY]     prints what the export is and times one decision on random keys
"""
import ctypes
import ctypes.util
import math
import os
import sys

F32, BF16, FP8 = range(3)
SUM, MEAN, MAX, EXPORTED = 0, 1, 2, -1
THRESHOLD, TOPK, BUDGET, PAGES, CALIBRATED = range(5)
ABI, ERROR_BYTES, PAGE_BYTES = 1, 768, 8448


class Options(ctypes.Structure):
    _fields_ = [("device", ctypes.c_char_p), ("path", ctypes.c_int32), ("max_batch", ctypes.c_int32), ("max_chunks", ctypes.c_int64)]


class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int32) for n in ("hidden", "n_head", "head_dim", "rank", "n_layer")]
    _fields_ += [("ordinal", ctypes.c_int32 * 64), ("layer_id", ctypes.c_int32 * 64), ("ensemble", ctypes.c_int32), ("calibrated", ctypes.c_int32)]
    _fields_ += [(n, ctypes.c_int64) for n in ("tau", "tail", "trained_length", "device_bytes", "host_bytes")]


class Rule(ctypes.Structure):
    _fields_ = [("mode", ctypes.c_int32), ("ensemble", ctypes.c_int32), ("k", ctypes.c_int64), ("cap", ctypes.c_int64)]
    _fields_ += [("budget", ctypes.c_double), ("threshold", ctypes.c_float), ("sink", ctypes.c_int64), ("tail", ctypes.c_int64)]


def address(array):
    """Of a numpy array or a torch tensor, both contiguous."""
    return array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data


def numpy_new(shape, dtype):
    import numpy

    return numpy.empty(shape, dtype)


class Indexer:
    def __init__(self, folder, library="liblsa_indexer.so.1", device="cpu", path=F32, max_batch=1, max_chunks=32768, new=numpy_new, stream=lambda: None):
        self.lib, self.handle, self.new, self.stream = ctypes.CDLL(library), ctypes.c_void_p(), new, stream
        self.error = ctypes.create_string_buffer(ERROR_BYTES)
        p, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        self.lib.lsa_idx_open.argtypes = [ctypes.POINTER(p), i32, ctypes.c_char_p, ctypes.POINTER(Options), p]
        self.lib.lsa_idx_close.argtypes, self.lib.lsa_idx_close.restype = [p], None
        self.lib.lsa_idx_get_info.argtypes, self.lib.lsa_idx_get_info.restype = [p, ctypes.POINTER(Info)], None
        self.lib.lsa_idx_query.argtypes = [p, i32, i32, p, p, p, p]
        self.lib.lsa_idx_score.argtypes = [p, i32, i32, p, p, i64, p, p]
        self.lib.lsa_idx_select.argtypes = [p, i32, ctypes.POINTER(Rule), p, i64, p, p, i64, p, p, p]
        options = Options(device.encode(), path, max_batch, max_chunks)
        self.call("open", ctypes.byref(self.handle), ABI, os.fsencode(folder), ctypes.byref(options))
        self.info = Info()
        self.lib.lsa_idx_get_info(self.handle, ctypes.byref(self.info))

    def call(self, name, *args):
        if getattr(self.lib, "lsa_idx_" + name)(*args, self.error):
            raise RuntimeError(self.error.value.decode())

    def close(self):
        self.lib.lsa_idx_close(self.handle)
        self.handle = ctypes.c_void_p()

    def score(self, layer, hidden, positions, pool, page_table, chunks, logits):
        """logits [m, ld] of one joint layer. hidden [m, hidden], positions i64 [m], chunks i64 [m]; pool u8 [pages,
        8448]; page_table i32 [m, width]: chunk c of request i is entry c % 64 of page page_table[i, c // 64]."""
        m = len(positions)
        keys = self.new((m, 3), "int64")  # struct lsa_idx_keys: data, page, n_chunk
        keys[:, 0] = address(pool)
        for i in range(m):
            keys[i, 1] = address(page_table) + 4 * page_table.shape[1] * i
        keys[:, 2] = chunks
        self.call("query", self.handle, layer, m, address(hidden), address(positions), self.stream())
        self.call("score", self.handle, layer, m, address(keys), address(logits), logits.shape[1], self.stream())
        return keys  # to be kept until the stream is past the call

    def select(self, rule, logits, chunks, room):
        """(ids i32 [m, room], counts i32 [m]) from logits [n_layer, m, ld]."""
        m = logits.shape[1]
        ids, counts = self.new((m, room), "int32"), self.new((m,), "int32")
        self.call("select", self.handle, m, ctypes.byref(rule), address(logits), logits.shape[2], address(chunks), address(ids), room, address(counts), self.stream())
        return ids, counts


def retrieve_topk(indexer, hidden, positions, paged_keys, page_table, lengths, k, pages=False, sink=0, tail=-1, threshold=0.5, ensemble=EXPORTED):
    """What stays on the GPU for the next tau tokens: (ids, counts), row i holding counts[i] ascending chunk ids of
    request i, or page numbers with pages=True.

    hidden       one [m, hidden] array for each joint layer: its attention input, after the norm, of the newest token
    positions    i64 [m], of that token
    paged_keys   one pool u8 [pages, 8448] of index keys for each joint layer
    page_table   i32 [m, width], shared by the layers
    lengths      i64 [m], tokens: positions + 1
    k            chunks beside sink and tail; with pages=True pages, those of sink and tail included, ranked by how
                 many chunks score above `threshold` (NaN: the calibrated one is asked for by a Rule of your own)
    """
    m, n_layer, width = len(positions), indexer.info.n_layer, page_table.shape[1] * 64
    chunks = indexer.new((m,), "int64")
    chunks[:] = lengths // 4
    logits = indexer.new((n_layer, m, width), "float32")
    kept = [indexer.score(l, hidden[l], positions, paged_keys[l], page_table, chunks, logits[l]) for l in range(n_layer)]
    rule = Rule(PAGES if pages else TOPK, ensemble, k, 0, 0.0, threshold, sink, tail)
    if pages:
        room = page_table.shape[1]
    else:
        room = min(width, k + sink + (math.ceil(indexer.info.tail / 4) if tail < 0 else tail))
    result = indexer.select(rule, logits, chunks, max(room, 1))
    del kept
    return result


def main():
    import time

    import numpy as np

    folder, library = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ctypes.util.find_library("lsa_indexer") or "liblsa_indexer.so.1"
    x = Indexer(folder, library)
    i, rng = x.info, np.random.default_rng(1)
    print(f"{i.n_layer} joint layers {list(i.ordinal[: i.n_layer])}, hidden {i.hidden}, {i.n_head} heads, rank {i.rank}; a decision lasts {i.tau} tokens, tail {i.tail}")
    hidden = [(rng.standard_normal((1, i.hidden)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for _ in range(i.n_layer)]
    pool = rng.integers(0, 0x7F, (256, PAGE_BYTES), np.uint8)
    pool[:, 8192:].view(np.float32)[:] = 0.01
    length = np.array([65536], np.int64)
    table = np.arange(256, dtype=np.int32)[None, :]
    start = time.perf_counter()
    ids, counts = retrieve_topk(x, hidden, length - 1, [pool] * i.n_layer, table, length, 1638)
    print(f"64 K tokens: {counts[0]} of {length[0] // 4} chunks kept, {(time.perf_counter() - start) * 1e3:.1f} ms; the newest: {ids[0, : counts[0]][-1]}")
    x.close()


if __name__ == "__main__":
    main()
