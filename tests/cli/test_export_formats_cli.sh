#!/usr/bin/env bash
# lsa-export write and import from outside: every option, one clear message for every kind of bad file, disk full, damaged variants.
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/expect.sh
export OMP_NUM_THREADS=2
export PYTHONPATH=tests/testkit
teacher=recipes/mini/teacher
ex=$bin/lsa-export
n=0
import() { # code text source options...: into a fresh folder
    local code=$1 text=$2 source=$3
    shift 3
    n=$((n + 1))
    expect "$code" "$text" "$ex" import "$source" --out "$work/import$n" "$@"
    [ "$code" = 0 ] || [ ! -e "$work/import$n/ckpt/latest" ] || bad "a refused import left a checkpoint: $source"
}

for option in --dtype --pt --pt-freqs --per-layer --gguf --ensemble --threshold --force; do expect 0 -- "$ex" write --help; grep -qF -- "$option" "$work/out" || bad "no $option in write --help"; done
for option in --layers --teacher --out; do expect 0 -- "$ex" import --help; grep -qF -- "$option" "$work/out" || bad "no $option in import --help"; done

# write: options
expect 0 "wrote" "$ex" import $teacher --out "$work/native"
write=("$ex" write "$work/native" --out)
expect 2 "f32, bf16 or fp8" "${write[@]}" "$work/x" --dtype int8
for v in 0 -3 16777217; do expect 2 "--pt-freqs" "${write[@]}" "$work/x" --pt-freqs $v; done
expect 2 "" "${write[@]}" "$work/x" --pt-freqs many
for v in nan -0.1 2; do expect 2 "--threshold" "${write[@]}" "$work/x" --threshold=$v; done
[ ! -e "$work/x" ] || bad "a refused write left a folder"
expect 0 "indexer.pt, layer_*.safetensors, indexer.gguf" "${write[@]}" "$work/ix" --pt-freqs 100 --per-layer --gguf
expect 0 "" "${write[@]}" "$work/fp8" --dtype fp8 --pt --gguf
expect 0 "fp8" "$ex" card "$work/fp8"
expect 0 "" "$ex" verify "$work/fp8" --checkpoint "$work/native"

# the decoder runs on every weight type, and close to the same
for t in f32 bf16 fp8; do
    expect 0 "" "${write[@]}" "$work/d" --dtype $t --force
    expect 0 "captured" "$bin/lsa-decode" validate --teacher $teacher --tokens recipes/mini/val.u16 --needs recipes/mini/val.jsonl --documents 0:1 \
        --indexer "$work/d" --policy lsa --json
    cp "$work/out" "$work/$t.json"
done
"$python" - "$work" <<'PY' || bad "bf16 or fp8 weights capture much less than f32"
import json, sys
c = {t: json.loads([line for line in open(f"{sys.argv[1]}/{t}.json") if line.startswith("{")][0])["captured"] for t in ("f32", "bf16", "fp8")}
assert abs(c["bf16"] - c["f32"]) < 0.01 and abs(c["fp8"] - c["f32"]) < 0.05, c
PY

# a variant that was changed, cut, lengthened, or that lost its scales
for file in indexer.pt indexer.gguf layer_03.safetensors; do
    for how in 'd[len(d) // 2] ^= 1' 'del d[-1]' 'd += b"x"'; do
        rm -rf "$work/e"
        cp -r "$work/ix" "$work/e"
        "$python" -c "
import sys
d = bytearray(open(sys.argv[1], 'rb').read())
exec(sys.argv[2])
open(sys.argv[1], 'wb').write(d)" "$work/e/$file" "$how"
        expect 3 "$file" "$ex" verify "$work/e"
    done
done

# import: bad files
"$python" - "$work" <<'PY' || bad "cannot make the bad files"
import struct, sys, zipfile
import numpy as np
from safetensors.numpy import save_file
import torch_zip

W = sys.argv[1]
rng = np.random.default_rng(1)


def good(layers=(10, 12), hidden=4096, heads=2, rank=8):
    shapes = {"wq_a.weight": (rank, hidden), "wq_b.weight": (heads * 128, rank), "q_norm_weight": (rank,), "weights_proj.weight": (heads, hidden)}
    return {f"retrievers.l{o}.{k}": rng.standard_normal(s).astype(np.float32) for o in layers for k, s in shapes.items()}


def save(name, change):
    t = good()
    change(t)
    save_file(t, f"{W}/{name}.safetensors")
    torch_zip.save(f"{W}/{name}.pt", t)


q = "retrievers.l12."
save("good", lambda t: None)
save("nan", lambda t: t[q + "wq_b.weight"].__setitem__((0, 3), np.nan))
save("gone", lambda t: t.pop(q + "weights_proj.weight"))
save("gone_b", lambda t: t.pop("retrievers.l10.wq_b.weight"))
save("rank", lambda t: t.update({q + "q_norm_weight": np.ones(9, np.float32)}))
save("heads", lambda t: t.update({"retrievers.l10.wq_b.weight": np.ones((200, 8), np.float32)}))
save("many", lambda t: t.update({"retrievers.l10.wq_b.weight": np.ones((129 * 128, 8), np.float32)}))
save("mixed", lambda t: t.update({k: v for k, v in good((12,), rank=16).items()}))
save("flat", lambda t: t.update({"retrievers.l10.wq_a.weight": np.ones(8 * 4096, np.float32)}))
save("ord", lambda t: t.update(good((22,))))
save("far", lambda t: t.update(good((70,))))
save("int", lambda t: t.update({q + "wq_a.weight": np.ones((8, 4096), np.int64)}))
save_file(good(hidden=512), f"{W}/small.safetensors")
save_file({"model.weight": np.ones(3, np.float32)}, f"{W}/other.safetensors")
save_file({k.split(".", 2)[2]: v for k, v in good((10,)).items()}, f"{W}/one.safetensors")
raw = open(f"{W}/good.pt", "rb").read()
open(f"{W}/cut.pt", "wb").write(raw[:-200])
open(f"{W}/legacy.pt", "wb").write(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(64))
bad = bytearray(raw)
bad[len(raw) // 2] ^= 1
open(f"{W}/crc.pt", "wb").write(bad)
with zipfile.ZipFile(f"{W}/packed.pt", "w", zipfile.ZIP_DEFLATED) as z:
    for n in zipfile.ZipFile(f"{W}/good.pt").namelist():
        z.writestr(n, zipfile.ZipFile(f"{W}/good.pt").read(n))
for name, text in (("evil", b"\x80\x02cos\nsystem\nX\x09\x00\x00\x00touch ran\x85R."), ("namespace", b"\x80\x02}X\x04\x00\x00\x00argscargparse\nNamespace\n)\x81s.")):
    with zipfile.ZipFile(f"{W}/{name}.pt", "w") as z:
        z.writestr("a/data.pkl", text)
        z.writestr("a/version", "3\n")
open(f"{W}/text.safetensors", "w").write("hello, this is no tensor file at all")
open(f"{W}/empty.pt", "w").close()
# fp8 codes whose scales are missing: the header is edited
data = open(f"{W}/fp8/indexer.safetensors", "rb").read()
n = struct.unpack("<Q", data[:8])[0]
head = data[8 : 8 + n].replace(b"retrievers.l1.wq_b.weight_scale", b"retrievers.l1.wq_b.weight_SCALE")
open(f"{W}/noscale.safetensors", "wb").write(data[:8] + head + data[8 + n :])
PY
import 0 "DeepSeek-V4-Flash" "$work/good.pt"
import 0 "layer 22" "$work/good.safetensors"
import 0 "" "$work/good.pt" --layers 12
for f in nan.pt nan.safetensors; do import 3 "l12.wq_b.weight: element 3 is not finite" "$work/$f"; done
for f in gone.pt gone.safetensors; do import 3 "'retrievers.l12.weights_proj.weight' is missing" "$work/$f"; done
import 3 "'retrievers.l10.wq_b.weight' is missing" "$work/gone_b.pt"
import 3 "q_norm_weight': expected [8], found [9]" "$work/rank.pt"
import 3 "expected [heads * 128, 8]" "$work/heads.safetensors"
import 3 "at most 128 heads" "$work/many.safetensors"
import 3 "expected [8,4096], found [16,4096]" "$work/mixed.safetensors"
import 3 "not a matrix" "$work/flat.pt"
import 2 "21 CSA layers" "$work/ord.pt"
import 3 "at most 64 CSA layers" "$work/far.pt"
for f in int.pt int.safetensors; do import 3 "I64 are not weights" "$work/$f"; done
import 1 "give --teacher" "$work/small.safetensors"
import 1 "has 256" "$work/small.safetensors" --teacher $teacher
import 3 "holds no indexer" "$work/other.safetensors"
import 2 "--layers N" "$work/one.safetensors"
import 2 "ordinals 0 to 20" "$work/one.safetensors" --layers 21
import 0 "ordinal 10 is layer 22" "$work/one.safetensors" --layers 10
import 2 "--layers" "$work/good.pt" --layers 11
import 2 "" "$work/good.pt" --layers 10,x
import 3 "no end of a zip directory" "$work/cut.pt"
import 3 "old format" "$work/legacy.pt"
import 3 "too few" "$work/empty.pt"
import 3 "CRC" "$work/crc.pt"
import 3 "compressed" "$work/packed.pt"
import 3 "os.system" "$work/evil.pt"
[ ! -e ran ] || bad "a pickle ran a command"
import 3 "argparse.Namespace" "$work/namespace.pt"
import 3 "header" "$work/text.safetensors"
import 3 "scales 'retrievers.l1.wq_b.weight_scale' are missing" "$work/noscale.safetensors"
import 1 "does not exist" "$work/none.pt"
import 3 "neither a model" "$work"
import 2 "is a checkpoint already" "$work/native"
import 2 "is a checkpoint already" "$work/native/ckpt/step_00000000"
import 2 "belongs to a checkpoint already" "$work/native/ckpt/step_00000000/model.safetensors"
import 2 "--teacher is for files" "$work/ix" --teacher $teacher
import 2 "leave --teacher out" $teacher --teacher $teacher
import 1 "config.json" "$work/good.pt" --teacher "$work"
expect 2 "--out" "$ex" import "$work/good.pt"
expect 2 "already holds checkpoints" "$ex" import "$work/good.pt" --out "$work/native"
# layer files: of a layer that is none of CSA, with joint names
mkdir "$work/layers" "$work/layers2"
cp "$work/one.safetensors" "$work/layers/layer_23.safetensors"
import 3 "not a CSA layer" "$work/layers"
cp "$work/good.safetensors" "$work/layers2/layer_22.safetensors"
import 3 "joint names" "$work/layers2"

# disk full at any file: exit 4, neither the folder nor what was written of it
for k in 20 600 1300; do
    (ulimit -f $k; exec "${write[@]}" "$work/small" --pt-freqs 60000 --per-layer --gguf >"$work/out" 2>&1)
    rc=$?
    [ $rc = 4 ] || { bad "disk full at $k KiB gave exit $rc"; cat "$work/out"; }
    [ ! -e "$work/small" ] && [ ! -e "$work/small.tmp" ] || bad "an export that did not fit left something"
done
# and the folder that stood there is still good
(ulimit -f 600; exec "${write[@]}" "$work/ix" --pt-freqs 60000 --force >"$work/out" 2>&1)
[ $? = 4 ] || bad "disk full over an existing folder"
expect 0 "ok" "$ex" verify "$work/ix"
verdict
