#!/usr/bin/env bash
# The mini teacher's yardstick at full size: dump TRAIN, train recipes/mini-gpu.yaml, export, and compare all policies on held-out
# documents of 16,384 tokens. Wants a GPU for the training and many CPU cores for the rest.
#   recipes/yardstick.sh BIN TEACHER TRAIN.u16 TRAIN.jsonl VAL.u16 VAL.jsonl VAL_DOCUMENTS OUT [lsa-train options]
# TRAIN comes from recipes/mini/plant.py over text that no validation document shares.
set -euo pipefail
bin=$1 teacher=$2 train=$3 train_needs=$4 val=$5 val_needs=$6 val_docs=$7 out=$8
shift 8
cd "$(dirname "$0")/.."
mkdir -p "$out"
"$bin"/lsa-dump run --teacher "$teacher" --tokens "$train" --needs "$train_needs" --hidden-stride 8 --out "$out/shards"
"$bin"/lsa-train run --recipe recipes/mini-gpu.yaml --data "$out/shards" --out "$out/run" "$@"
"$bin"/lsa-export write "$out/run" --out "$out/indexer"
"$bin"/lsa-export verify "$out/indexer"
"$bin"/lsa-decode validate --teacher "$teacher" --tokens "$val" --needs "$val_needs" --documents "$val_docs" \
    --indexer "$out/indexer" --policy full,dense,lsa,oracle,recency,random,untrained,last,last-spread --budget 0.05,0.10,0.20 \
    --tau 64 --tail 256 --report "$out/report"
