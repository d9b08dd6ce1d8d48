#!/usr/bin/env bash
# The README's first command on a copy of the tree: ends well, leaves exactly one indexer.safetensors, one lsa-decode
# and one report.html, and its indexer beats recency by half of the answers, and in captured mass.
set -euo pipefail
src=${LSA_SRC:-$PWD}
dir=$(mktemp -d /tmp/lsa-quickstart.XXXXXX)
trap 'rm -rf "$dir"' EXIT
(cd "$src" && git ls-files -z --cached --others --exclude-standard | tar --null -T - --ignore-failed-read -cf -) | tar -xf - -C "$dir"
cd "$dir"
start=$SECONDS
bash recipes/quickstart.sh
echo "quick start took $((SECONDS - start)) s"
count() { find . -name "$1" "${@:2}" | wc -l; }
[ "$(count indexer.safetensors)" = 1 ] || { echo "expected exactly one indexer.safetensors"; exit 1; }
[ "$(count lsa-decode -type f -executable)" = 1 ] || { echo "expected exactly one lsa-decode"; exit 1; }
[ "$(count report.html)" = 1 ] || { echo "expected exactly one report.html"; exit 1; }
"${LSA_PYTHON:-python3}" - out/quickstart/report/report.json <<'E2'
import json, math, sys
rows = {r["policy"]: r for r in json.load(open(sys.argv[1]))["rows"]}
lsa, rec, full = rows["lsa"], rows["recency"], rows["full"]
print("recalled lsa %.3f recency %.3f full %.3f; captured lsa %.3f recency %.3f" % (
    lsa["recalled"], rec["recalled"], full["recalled"], lsa["captured"], rec["captured"]))
ok = lsa["recalled"] >= rec["recalled"] + 0.50 and lsa["captured"] > rec["captured"] and math.isfinite(lsa["nll"])
sys.exit(0 if ok else "the trained indexer does not beat recency as it should")
E2
