#!/usr/bin/env python3
"""The lines of recipes/ablation.sh as a Markdown table: means over seeds and documents, 95 % bootstrap intervals over documents.

    recipes/ablation_table.py results.jsonl

Answers recalled is over answer tokens, losses over tokens of their kind, captured mass over windows, all against the full run of the same documents.
A document counts by its own mean, and all documents of an ablation are of one length. Needs nothing but Python."""
import json
import random
import sys
from collections import defaultdict

COLUMNS = [("recalled", "answers recalled", 3), ("replay_over", "replays, nats over full", 3), ("other_over", "other text, nats over full", 4),
           ("captured", "mass captured", 3)]


def read(path):
    cells = defaultdict(lambda: defaultdict(list))  # (name, budget) -> document -> rows of the seeds
    with open(path, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    full = {r["document"]: r for r in rows if r["policy"] == "full"}
    for r in rows:
        for part in ("replay", "other"):
            both = [x.get(f"nll_{part}") for x in (r, full[r["document"]])]
            r[f"{part}_over"] = None if None in both else both[0] - both[1]
        name = r["policy"] if r["variant"] == "-" else f"lsa, {r['variant']}"
        cells[name, r["budget"] if r["policy"] not in ("full", "dense") else None][r["document"]].append(r)
    return cells


def means(rows, key):
    v = [r[key] for r in rows if r.get(key) is not None]
    return sum(v) / len(v) if v else None


def interval(values, draws=2000, seed=1):
    """95 % of the means of documents drawn with replacement."""
    rng = random.Random(seed)
    n = len(values)
    if n < 2:
        return None
    m = sorted(sum(rng.choice(values) for _ in range(n)) / n for _ in range(draws))
    return m[int(0.025 * draws)], m[int(0.975 * draws) - 1]


def cell(documents, key, digits):
    v = [x for x in (means(rows, key) for rows in documents.values()) if x is not None]
    if not v:
        return ""
    both = interval(v)
    text = f"{sum(v) / len(v):.{digits}f}"
    return text if both is None else f"{text} [{both[0]:.{digits}f}, {both[1]:.{digits}f}]"


def table(cells):
    out = []
    for budget in sorted({b for _, b in cells if b is not None}):
        out += [f"### Budget {100 * budget:g} %", "", "| policy | " + " | ".join(c[1] for c in COLUMNS) + " | documents, seeds |", "|---" * (len(COLUMNS) + 2) + "|"]
        for (name, b), documents in cells.items():
            if b not in (None, budget):
                continue
            seeds = len({r["seed"] for rows in documents.values() for r in rows})
            out.append(f"| {name} | " + " | ".join(cell(documents, k, d) for k, _, d in COLUMNS) + f" | {len(documents)}, {seeds} |")
        out.append("")
    return "\n".join(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(table(read(sys.argv[1])))
