"""torch.save archives without torch: a reader over zipfile and pickle whose find_class knows a whitelist, and a writer that makes
Python's own pickler produce what torch's does (memo, protocol 2, persistent storages). Shares no code with data/torch_*.c."""
import collections
import io
import pickle
import sys
import types
import zipfile

import numpy as np

DTYPES = {"FloatStorage": np.dtype("<f4"), "BFloat16Storage": np.dtype("<u2"), "HalfStorage": np.dtype("<f2"), "LongStorage": np.dtype("<i8"),
          "ByteStorage": np.dtype("u1"), "ComplexFloatStorage": np.dtype("<c8")}


def load(path):
    """name -> array (bf16 as u16) of an archive; the order of the dict; the names of the entries and where their data begin."""
    archive = zipfile.ZipFile(path)
    assert archive.testzip() is None
    infos = archive.infolist()
    assert all(i.compress_type == zipfile.ZIP_STORED for i in infos)
    raw, begin = open(path, "rb").read(), {}
    for i in infos:  # the local header's own lengths
        at = i.header_offset
        begin[i.filename] = at + 30 + int.from_bytes(raw[at + 26 : at + 28], "little") + int.from_bytes(raw[at + 28 : at + 30], "little")
    root = next(i.filename for i in infos if i.filename.endswith("/data.pkl"))[: -len("/data.pkl")]

    class Storage:
        def __init__(self, name):
            self.name = name

    def rebuild(storage, offset, size, stride, requires_grad, hooks):
        assert requires_grad is False and not hooks
        want = [int(np.prod(size[i + 1 :])) for i in range(len(size))]
        assert list(stride) == want, (stride, want)
        return storage[offset : offset + int(np.prod(size))].reshape(size)

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) == ("collections", "OrderedDict"):
                return collections.OrderedDict
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return rebuild
            if module == "torch" and name in DTYPES:
                return Storage(name)
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")

        def persistent_load(self, pid):
            kind, storage, key, location, numel = pid
            assert kind == "storage" and location == "cpu"
            x = np.frombuffer(archive.read(f"{root}/data/{key}"), DTYPES[storage.name])
            assert len(x) == numel
            return x

    data = Reader(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
    assert archive.read(f"{root}/version").strip() == b"3" and archive.read(f"{root}/byteorder") == b"little"
    return data, begin


def save(path, obj, root="archive"):
    """obj: nested dicts, lists and numbers with numpy arrays as tensors (u2: bf16)."""
    modules = {m: types.ModuleType(m) for m in ("torch", "torch._utils")}
    storages, blobs = {v: k for k, v in DTYPES.items()}, []
    for name in DTYPES:
        setattr(modules["torch"], name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*args):
        raise AssertionError

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    modules["torch._utils"]._rebuild_tensor_v2 = _rebuild_tensor_v2

    class Blob:
        def __init__(self, x):
            self.x = x

    class Tensor:
        def __init__(self, x):
            self.x = x

        def __reduce__(self):
            stride = tuple(s // self.x.itemsize for s in self.x.strides)
            return _rebuild_tensor_v2, (Blob(self.x), 0, self.x.shape, stride, False, collections.OrderedDict())

    class Writer(pickle.Pickler):
        def persistent_id(self, o):
            if not isinstance(o, Blob):
                return None
            blobs.append(o.x.tobytes())
            return ("storage", getattr(modules["torch"], storages[o.x.dtype]), str(len(blobs) - 1), "cuda:0", o.x.size)

    def wrap(o):
        if isinstance(o, dict):
            return type(o)((k, wrap(v)) for k, v in o.items())
        if isinstance(o, list):
            return [wrap(v) for v in o]
        return Tensor(np.ascontiguousarray(o)) if isinstance(o, np.ndarray) else o

    out, saved = io.BytesIO(), {m: sys.modules.get(m) for m in modules}
    sys.modules.update(modules)
    try:
        Writer(out, protocol=2).dump(wrap(obj))
    finally:
        for m, old in saved.items():
            if old is None:
                del sys.modules[m]
            else:
                sys.modules[m] = old
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        z.writestr(f"{root}/data.pkl", out.getvalue())
        z.writestr(f"{root}/byteorder", "little")
        for i, b in enumerate(blobs):
            z.writestr(f"{root}/data/{i}", b)
        z.writestr(f"{root}/version", "3\n")
