#!/usr/bin/env bash
# Writes the exact samples of five short training runs, for the PyTorch oracle make_reference_curve.py:
#   bash tests/oracle/make_trace.sh OUTDIR [DEVICE]        LSA_BIN: folder with lsa-dump and lsa-train
# OUTDIR/<case>.safetensors holds initial parameters, samples and our losses, OUTDIR/<case>.json the recipe and the geometry.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:?usage: make_trace.sh OUTDIR [DEVICE]}
device=${2:-cpu}
bin=${LSA_BIN:-build/cpu/bin}
python=${LSA_PYTHON:-python3}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$bin/lsa-dump" synth --out "$work/shards" --docs 6 --tokens 640 --layers 2 --hidden 64 --hidden-stride 1 --seed 7 >/dev/null

trace() { # case recipe [--set ...]
    local name=$1 recipe=$2
    shift 2
    "$bin/lsa-train" run --recipe "recipes/$recipe.yaml" --data "$work/shards" --out "$work/$name" --device "$device" \
        --set model.heads=8 --set model.rank=32 --set train.batch=8 --set sample.val_documents=0 --set sample.min_layers=2 \
        --set train.precision=f32 --set train.eval_every=0 --set train.save_every=1000 --set train.trace="$work/$name.safetensors" "$@" \
        2>"$work/$name.log" || { cat "$work/$name.log"; exit 1; }
    mv "$work/$name.safetensors" "$out/$name.safetensors"
    "$python" - "$work/$name" "$out/$name" <<'PY'
import glob, hashlib, json, struct, sys
run, out = sys.argv[1:]
def header(path):
    with open(path, "rb") as f:
        return json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
def tensors(path):
    with open(path, "rb") as f:
        head = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        data = f.read()
    return {k: data[v["data_offsets"][0]:v["data_offsets"][1]] for k, v in head.items() if k != "__metadata__"}
# Which windows and chunks were asked, integers alone: the last bit of a made-up float may differ between machines.
h, t = hashlib.sha256(), tensors(out + ".safetensors")
steps = len(t["loss"]) // 8
for s in range(steps):
    for k in ("doc", "position", "n_cand", "cand"):
        h.update(t.get(f"{s}.{k}", b""))
model = sorted(glob.glob(run + "/ckpt/step_*/model.safetensors"))[-1]
json.dump({"recipe": json.load(open(run + "/run.json"))["recipe"], "steps": steps, "samples_sha256": h.hexdigest(),
           "geometry": json.loads(header(model)["__metadata__"]["lsa.geometry"])}, open(out + ".json", "w"), indent=1)
PY
}

# A larger rate, decay and a tighter clip than the recipe's, so that a wrong optimiser shows in 200 steps.
trace reference_focal reference --set train.steps=200 --set sample.max_pos=16 --set optim.lr=2e-3 --set optim.weight_decay=0.3 \
    --set optim.clip=0.05
trace lookahead_kl smoke --set train.steps=200 --set window.stride=4 --set loss.kind=kl --set loss.on=sum --set optim.warmup=20
trace reference_bce reference --set train.steps=60 --set sample.max_pos=16 --set loss.kind=bce --set loss.weighted=true \
    --set loss.smoothing=0.05
trace reference_bpr reference --set train.steps=60 --set sample.max_pos=8 --set loss.kind=bpr
trace reference_margin reference --set train.steps=60 --set sample.max_pos=8 --set loss.kind=margin --set loss.margin=0.7
