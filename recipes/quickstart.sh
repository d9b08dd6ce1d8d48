#!/usr/bin/env bash
# The whole chain on a CPU, in one command: install, build, then
#   lsa-dump (teacher -> shards) -> lsa-train (shards -> checkpoint) -> lsa-export (checkpoint -> indexer)
#   -> lsa-decode validate (the indexer against full attention and simple policies, on documents it never saw).
# Ends with the policy table and the path of report.html. Results lie in out/quickstart; a second run starts afresh.
#   LSA_OUT=DIR         put the results elsewhere
#   LSA_SKIP_INSTALL=1  the packages are there already
set -euo pipefail
cd "$(dirname "$0")/.."
mini=recipes/mini
out=${LSA_OUT:-out/quickstart}
t0=$SECONDS
step() { printf '\n== [%3d s] %s\n' $((SECONDS - t0)) "$*"; }

if [ "${LSA_SKIP_INSTALL:-0}" != 1 ]; then
    step "install"
    bash recipes/install-deps.sh
fi

step "build"
cmake -B build/quickstart -G Ninja -DLSA_CUDA=OFF -DLSA_TESTS=OFF >/dev/null
cmake --build build/quickstart
bin=build/quickstart/bin
rm -rf "$out"
mkdir -p "$out"

step "dump: the teacher reads 64 documents of 8,192 tokens and writes what it attended to"
$bin/lsa-dump run --teacher $mini/teacher --tokens $mini/train.u16 --needs $mini/train.jsonl --documents 0:64 --out "$out/shards"
$bin/lsa-dump verify "$out/shards"

step "train: three joint layers learn which chunks the next 64 tokens will need"
$bin/lsa-train run --recipe recipes/mini-cpu.yaml --data "$out/shards" --out "$out/run"

step "export and check the exported file"
$bin/lsa-export write "$out/run" --out "$out/indexer"
$bin/lsa-export verify "$out/indexer"

step "validate: 4 held-out documents, with 10 % of the far cache against all of it"
$bin/lsa-decode validate --teacher $mini/teacher --tokens $mini/val.u16 --needs $mini/val.jsonl --documents 0:4 \
    --indexer "$out/indexer" --policy full,dense,lsa,oracle,recency,random,untrained --budget 0.10 \
    --tau 64 --tail 256 --report "$out/report"

step "done"
echo "report: $(realpath "$out/report/report.html")"
