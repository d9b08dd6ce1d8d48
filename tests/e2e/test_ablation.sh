#!/usr/bin/env bash
# recipes/ablation.sh on two tiny variants: every document and budget of every variant and seed once, nothing run twice, and the table's means and
# intervals against sums of its own lines.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${LSA_BIN:?}
python=${LSA_PYTHON:-python3}
work=$(mktemp -d /tmp/lsa-ablation-XXXXXX)
trap 'rm -rf "$work"' EXIT
mini=recipes/mini
# documents of 2,048 tokens: the first of the training file, cut (no planted needs fall behind the cut)
"$python" - "$mini" "$work" <<'PY'
import json, sys
mini, work = sys.argv[1:]
rows = [json.loads(l) for l in open(f"{mini}/train.jsonl")][:6]
data = open(f"{mini}/train.u16", "rb").read()
with open(f"{work}/t.u16", "wb") as t, open(f"{work}/t.jsonl", "w") as f:
    for i, r in enumerate(rows):
        t.write(data[2 * r["start"]:2 * r["start"] + 4096])
        near = lambda v, end: [x for x in v if end(x) + 64 < 2048]
        f.write(json.dumps({"document": i, "start": 2048 * i, "tokens": 2048, "facts": near(r["facts"], lambda x: max(x)),
                            "replays": near(r["replays"], lambda x: x[1] + x[2])}) + "\n")
PY
"$bin/lsa-dump" run --teacher $mini/teacher --tokens "$work/t.u16" --needs "$work/t.jsonl" --documents 0:4 --out "$work/shards" >/dev/null 2>&1
run() {
    LSA_PYTHON=$python bash recipes/ablation.sh --bin "$bin" --data "$work/shards" --val "$work/t.u16" "$work/t.jsonl" 4:6 --teacher $mini/teacher \
        --recipe recipes/mini-cpu.yaml --out "$work/out" --seeds "1 2" --budgets 0.10 --variants "default plain" -- \
        --set train.steps=3 --set model.heads=8 --set model.rank=16 --set train.batch=8 --set sample.val_documents=1 "$@" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
}
run
cp "$work/out/results.jsonl" "$work/first"
run
cmp "$work/first" "$work/out/results.jsonl"
"$python" - "$work/out" <<'PY'
import json, re, sys
rows = [json.loads(l) for l in open(f"{sys.argv[1]}/results.jsonl")]
text = open(f"{sys.argv[1]}/RESULTS.md").read()
keys = [(r["variant"], r["seed"], r["document"], r["policy"], r["budget"]) for r in rows]
assert len(set(keys)) == len(keys) == 2 * 6 + 2 * 2 * 2, len(keys)
for variant in ("default", "plain"):
    mine = [r for r in rows if r["variant"] == variant]
    assert {(r["seed"], r["document"]) for r in mine} == {(s, d) for s in (1, 2) for d in (4, 5)}
    line = next(l for l in text.splitlines() if l.startswith(f"| lsa, {variant} |"))
    mean = sum(r["captured"] for r in mine) / 4
    each = sorted(sum(r["captured"] for r in mine if r["document"] == d) / 2 for d in (4, 5))
    assert f"{mean:.3f} [{each[0]:.3f}, {each[1]:.3f}]" in line, (line, mean, each)
    assert line.endswith("| 2, 2 |"), line
    full = {r["document"]: r for r in rows if r["policy"] == "full"}
    over = sum(r["nll_other"] - full[r["document"]]["nll_other"] for r in mine) / 4
    assert f"| {over:.4f} [" in line, (line, over)
assert len({r["captured"] for r in rows if r["variant"] != "-"}) > 4, "variants and seeds do not differ"
PY
grep -q "model.continuation: 0" "$work/out/plain-1/recipe.yaml" && grep -q "seed: 2" "$work/out/plain-2/recipe.yaml"
rc=0
run2=$(bash recipes/ablation.sh --bin "$bin" 2>&1) || rc=$?
[ $rc = 2 ] && grep -q -- "--data is missing" <<<"$run2"
echo ok
