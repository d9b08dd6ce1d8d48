#!/usr/bin/env python3
"""The lines of recipes/scaling.sh as Markdown: what was checked, and the steps of each case with their efficiency against one GPU's plain step.

    recipes/scaling_table.py scaling.jsonl [--plot FILE.svg]
"""
import argparse
import json


def read(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def checks(rows):
    out = ["| case | GPUs | relative difference: first step, what is judged | allowed |", "|---|---|---|---|"]
    for r in rows:
        if r["scaling"] != "check":
            continue
        if "worst" in r:
            out.append(f"| {r['case']} | {r['gpus']} | {r['first']:.1e}, {r['worst']:.1e} (single steps up to {r['worst_step']:.1e}) | {r['allowed']:g} |")
        else:
            out.append(f"| {r['case']} | {r['gpus']} | named and ended after {r['seconds']} s, exit {r['exit']} | 30 s |")
    return out


def steps(rows):
    """(case, GPUs, ms, windows/s, efficiency, buses): efficiency is windows/s a GPU against the plain step of one GPU with as many windows; a strong
    case is held against the plain step of all its windows."""
    plain = {r["batch"]: r["windows_per_s"] for r in rows if r.get("bench") == "train" and r["ranks"] == 0}
    bus = {(r["case"], r["ranks"]): r for r in rows if r.get("bench") == "stages"}
    out = []
    for r in rows:
        if r.get("bench") != "train":
            continue
        batch = r["batch"] * (r["gpus"] if r["case"].startswith("strong") else 1)
        b = bus.get((r["case"], r["ranks"]), {})
        out.append((r["case"] + (", plain step" if r["ranks"] == 0 else ""), r["gpus"], r["ms"], r["windows_per_s"],
                    r["windows_per_s"] / r["gpus"] / plain[batch] if batch in plain else None,
                    [b.get("gradients_bus_gb_per_s"), b.get("weights_bus_gb_per_s")]))
    return out


def table(found):
    out = ["| case | GPUs | ms a step | windows/s | efficiency | bus alone, GB/s: gradients, weights |", "|---|---|---|---|---|---|"]
    for case, gpus, ms, rate, eff, bus in found:
        share = "" if eff is None else f"{100 * eff:.1f} %"
        out.append(f"| {case} | {gpus} | {ms:.3f} | {rate:,.0f} | {share} | {', '.join(f'{x:.0f}' for x in bus if x)} |")
    return out


def svg(found):
    """Bars of the efficiencies."""
    bars = [(f"{case}, {gpus} GPUs", eff) for case, gpus, _, _, eff, _ in found if eff is not None and gpus > 1]
    high = max([1.0] + [e for _, e in bars])
    width, row = 640, 18
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {row * (len(bars) + 2)}" font-family="sans-serif" font-size="12">',
           f'<rect width="{width}" height="{row * (len(bars) + 2)}" fill="white"/>',
           f'<text x="8" y="13" font-weight="bold">windows/s a GPU against one GPU alone</text>']
    for i, (name, eff) in enumerate(bars):
        y = row * (i + 1) + 4
        out.append(f'<text x="8" y="{y + 11}">{name}</text>')
        out.append(f'<rect x="290" y="{y}" width="{280 * eff / high:.1f}" height="{row - 5}" fill="#1b6ca8"/>')
        out.append(f'<text x="{294 + 280 * eff / high:.1f}" y="{y + 11}">{100 * eff:.1f} %</text>')
    x = 290 + 280 / high
    out.append(f'<line x1="{x:.1f}" y1="{row}" x2="{x:.1f}" y2="{row * (len(bars) + 1)}" stroke="#c0392b"/>')
    return "\n".join(out + ["</svg>"]) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("lines", help="scaling.jsonl")
    p.add_argument("--plot", metavar="FILE.svg", help="also draw the efficiencies")
    a = p.parse_args()
    rows = read(a.lines)
    found = steps(rows)
    print("\n".join(checks(rows) + ([""] + table(found) if found else [])))
    if a.plot:
        with open(a.plot, "w", encoding="ascii") as f:
            f.write(svg(found))


if __name__ == "__main__":
    main()
