#!/usr/bin/env bash
# On a planted teacher (topics; recency and chance capture 10 % of the mass at 10 %), training finds what windows need, with KL and with the
# losses on votes; and nothing but the recipe decides the result: not the number of threads, not the size of the document cache.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${LSA_BIN:?}
python=${LSA_PYTHON:-python3}
export OMP_WAIT_POLICY=passive # spinning threads starve each other when several tests share the cores
work=$(mktemp -d /tmp/lsa-synth-XXXXXX)
trap 'rm -rf "$work"' EXIT
"$bin/lsa-dump" synth --out "$work/shards" --docs 16 --tokens 2048 --layers 2 --seed 9 --shard-bytes 2M >/dev/null

train() { # name options...
    local name=$1
    shift
    "$bin/lsa-train" run --recipe recipes/smoke.yaml --data "$work/shards" --out "$work/$name" --device cpu --set train.batch=32 \
        --set sample.val_documents=4 "$@" 2>"$work/$name.log" || { cat "$work/$name.log"; exit 1; }
}
judge() { # name key least [row]
    "$bin/lsa-train" eval "$work/$1" --data "$work/shards" --held-out --device cpu --json >"$work/$1.json"
    "$python" - "$work/$1.json" "$@" <<'PY'
import json, sys
path, name, key, least = sys.argv[1:5]
row = sys.argv[5] if len(sys.argv) > 5 else "sum"
v = json.load(open(path))[row][key]
print(f"{name}: {row} {key} {v:.3f}, at least {least}")
sys.exit(not v >= float(least))
PY
}
train kl --set train.steps=200
judge kl captured_0.10 0.9
train untrained --set train.steps=1 --set optim.lr=0
if judge untrained captured_0.10 0.3; then echo "an untrained indexer captures too much: the task is too easy"; exit 1; fi
train focal --set train.steps=300 --set loss.kind=focal --set loss.on=layer --set sample.candidates=sampled --set eval.metric=f1
judge focal f1 0.6 mean
judge focal captured_0.10 0.85
train bce --set train.steps=200 --set loss.kind=bce --set loss.on=layer --set eval.topk=32
judge bce recall_at_k 0.85
train bpr --set train.steps=200 --set loss.kind=bpr --set sample.candidates=sampled --set eval.topk=32
judge bpr recall_at_k 0.85

same() {
    cmp "$work/$1/ckpt/step_00000040/model.safetensors" "$work/$2/ckpt/step_00000040/model.safetensors" &&
        cmp "$work/$1/ckpt/step_00000040/optim.safetensors" "$work/$2/ckpt/step_00000040/optim.safetensors" || { echo "$1 and $2 differ"; exit 1; }
}
OMP_NUM_THREADS=1 train one --set train.steps=40 --set sample.order=shuffled
OMP_NUM_THREADS=3 train three --set train.steps=40 --set sample.order=shuffled
OMP_NUM_THREADS=2 train small --set train.steps=40 --set sample.order=shuffled --set train.cache_mib=1
same one three
diff <(cd "$work/one/ckpt/step_00000040" && sha256sum state.json) <(cd "$work/three/ckpt/step_00000040" && sha256sum state.json)
same one small
echo "ok"
