#!/usr/bin/env python3
"""Lint of the tree: who includes whom, vendor headers, file sizes, no machine paths, README links and commands.

Each rule is a function from {path: text} to messages, so that the self-test at the end can feed it bad trees."""
import os
import re
import subprocess
import sys

CODE = (".c", ".h", ".cu", ".cuh")
# Folder of a file -> folders it may include. main_*.c, data/dump and tests may include everything.
CORE, OPS, MODEL, DATA = {"kernels/core"}, {"kernels"}, {"kernels/model"}, {"data"}
ALLOWED = {
    "kernels/core": CORE,
    "kernels": CORE | OPS | {"kernels/ref", "kernels/cpu", "kernels/cuda"},
    "kernels/ref": CORE | OPS | {"kernels/ref"},
    "kernels/cpu": CORE | OPS | {"kernels/cpu", "kernels/ref"},
    "kernels/cuda": CORE | OPS | MODEL | {"kernels/cuda"},
    "kernels/cuda/step": CORE | MODEL | {"kernels/comm", "kernels/cuda", "kernels/cuda/step"},
    "kernels/comm": CORE | {"kernels/comm"},
    "kernels/cuda/teacher": CORE | MODEL | {"kernels/cuda", "kernels/cuda/teacher"},
    "kernels/cuda/decode": CORE | MODEL | {"kernels/cuda", "kernels/cuda/teacher", "kernels/cuda/serve", "kernels/cuda/decode"},
    "kernels/cuda/serve": CORE | MODEL | {"kernels/cuda", "kernels/cuda/serve"},
    "kernels/model": CORE | OPS | MODEL,
    "data": CORE | MODEL | DATA,
    "trainer": CORE | OPS | MODEL | DATA | {"trainer", "kernels/cpu", "kernels/comm"},
    "export": CORE | OPS | MODEL | DATA | {"export", "kernels/cpu"},
    "export/abi": CORE | OPS | MODEL | DATA | {"export/abi", "kernels/cpu"},
    "infer": CORE | OPS | MODEL | DATA | {"infer", "kernels/cpu"},
}
VENDOR = [(r"^(cuda|cublas|cudnn)", r"^kernels/cuda/"), (r"^hdf5", r"^data/h5\.[ch]$"), (r"^nccl", r"^kernels/comm/"),
          (r"^mpi\.h", r"^kernels/comm/comm_mpi\.c$"), (r"^cyaml", r"^kernels/core/recipe\.c$"), (r"^argp", r"^kernels/core/cli\.c$"),
          (r"^(cblas|openblas)", r"^kernels/cpu/")]
ANY = re.compile(r"^(data/dump/|tests/|.*/main_[a-z]+\.c$)")


def includes(text):
    return re.findall(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]', text, re.M)


def include_graph(tree):
    for path, text in tree.items():
        if not path.endswith(CODE) or ANY.match(path):
            continue
        allowed = ALLOWED.get(os.path.dirname(path))
        if allowed is None:
            yield f"{path}: this folder is not in the include rule"
            continue
        for kind, inc in includes(text):
            if kind == '"' and os.path.dirname(inc) not in allowed:
                yield f"{path}: may not include {inc}"
            if kind == '"' and inc not in tree:
                yield f"{path}: includes {inc}, which does not exist (paths start at the repository root)"


def vendor_headers(tree):
    for path, text in tree.items():
        if not path.endswith(CODE) or path.startswith("tests/"):
            continue
        for kind, inc in includes(text):
            for what, where in VENDOR:
                if kind == "<" and re.match(what, inc) and not re.match(where, path):
                    yield f"{path}: <{inc}> belongs to {where}"


def guards(tree):
    for path, text in tree.items():
        if path.endswith(".h"):
            want = "LSA_" + re.sub(r"[^A-Z0-9]", "_", path[:-2].upper())
            public = os.path.basename(path).startswith("lsa_")
            if f"#ifndef {want}_H\n" not in text and not (public and re.search(r"#ifndef LSA_[A-Z0-9_]+_H\n", text)):
                yield f"{path}: expected the guard {want}_H (or LSA_*_H in a public header)"


def headings(tree):
    for path, text in tree.items():
        if path.endswith((".c", ".cu", ".h", ".cuh")) and not text.startswith("/*"):
            yield f"{path}: does not begin with a comment that says what it is"
        if path.endswith(CODE) and text.count("\n") > 800:
            yield f"{path}: {text.count(chr(10))} lines; split it"


def no_traces(tree):
    """Nothing of the machine it was made on, no secrets, no unfinished marks."""
    bad = [(r"/(home|root|Users|work|mnt|workspace)/", "a machine's path"), (r"-----BEGIN [A-Z ]*PRIVATE KEY", "a private key"),
           (r"\b(ghp|hf|sk)_[A-Za-z0-9]{20,}", "a token"), (r"\b(TODO|FIXME|XXX|HACK)\b(?!\()", "an open mark")]
    for path, text in tree.items():
        if path.startswith(("tests/lint/", "recipes/mini/teacher/")):
            continue
        for pattern, what in bad:
            m = re.search(pattern, text)
            if m:
                yield f"{path}:{text.count(chr(10), 0, m.start()) + 1}: {what}: {m.group(0)}"


def sizes(tree, size=os.path.getsize):
    for path in tree:
        if not path.startswith("recipes/mini/") and size(path) > 1 << 20:
            yield f"{path}: {size(path)} bytes; files over 1 MiB live in recipes/mini only"


def links(tree):
    for path, text in tree.items():
        if not path.endswith(".md"):
            continue
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not re.match(r"[a-z]+:", target) and not os.path.exists(os.path.normpath(os.path.join(os.path.dirname(path), target))):
                yield f"{path}: link to {target}, which does not exist"


def readme_commands(tree):
    """Every command of the README's shell blocks is run by some test or script, up to file names and numbers."""
    ran = "\n".join(t for p, t in tree.items() if p.endswith((".sh", ".py")) or p == ".ci/run")
    ran = re.sub(r"\\\n\s*", " ", ran)
    for block in re.findall(r"```sh\n(.*?)```", tree.get("README.md", ""), re.S):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = line.split("#")[0].strip()
            words = line.split()
            if not words:
                continue
            program = os.path.basename(words[0])
            if program in ("bash", "cmake", "ctest"):
                needle = re.escape(" ".join(words[:2]))
            elif program.startswith("lsa-"):
                needle = re.escape(program) + r'"?\s+' + re.escape(words[1])
                for flag in re.findall(r"--[a-z-]+", line):
                    if not re.search(re.escape(program) + r".*" + re.escape(flag), ran):
                        yield f"README.md: no test runs {program} with {flag}"
            else:
                continue
            if not re.search(needle, ran):
                yield f"README.md: no test runs: {line}"


RULES = [include_graph, vendor_headers, guards, headings, no_traces, links, readme_commands]


def self_test():
    bad = {
        include_graph: {"data/a.c": '/* */\n#include "infer/b.h"\n', "infer/b.h": "/* */"},
        vendor_headers: {"data/a.c": "/* */\n#include <cuda_runtime.h>\n"},
        guards: {"data/a.h": "/* */\n#ifndef A_H\n"},
        headings: {"data/a.c": "int x;\n"},
        no_traces: {"data/a.c": "/* see /home/someone/x */\n"},
        links: {"README.md": "[x](nowhere.md)"},
        readme_commands: {"README.md": "```sh\nlsa-train fly --high\n```\n"},
    }
    for rule, tree in bad.items():
        if not list(rule(tree)):
            sys.exit(f"self-test: {rule.__name__} does not see a bad tree")
    if not list(sizes({"a": ""}, size=lambda p: 2 << 20)):
        sys.exit("self-test: sizes")


def main():
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True, check=True).stdout
    tree, paths = {}, [p for p in names.decode().split("\0") if p and os.path.isfile(p)]
    for p in paths:
        try:
            tree[p] = open(p, encoding="utf-8").read()
        except UnicodeDecodeError:
            pass  # binaries
    self_test()
    messages = [m for rule in RULES for m in rule(tree)] + list(sizes(paths))
    print("\n".join(messages) or f"{len(paths)} files, {len(RULES) + 1} rules: clean")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
