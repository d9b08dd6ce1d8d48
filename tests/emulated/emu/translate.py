#!/ usr / bin / env python3
"""A CUDA source as C++ over emu.h: kernel launches become calls, dynamic shared memory a pointer. translate.py IN OUT"""
import re
import sys


def split(text):
    """At commas outside brackets."""
    parts, depth, part = [], 0, ""
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += c
    return parts + [part]


def launches(s):
    out, i = "", 0
    while (j := s.find("<<<", i)) >= 0:
        k, depth = j, 0  # back to the kernel's name, over template arguments
        while k > 0:
            depth += (s[k - 1] == ">") - (s[k - 1] == "<")
            if depth == 0 and s[k - 1] in " \n;{}(\t":
                break
            k -= 1
        end = s.index(">>>", j)
        q, depth = end + 3, 0
        while True:
            depth += (s[q] == "(") - (s[q] == ")")
            if depth == 0:
                break
            q += 1
        config = split(s[j + 3 : end])
        shared = config[2] if len(config) > 2 else "0"
        out += s[i:k] + f"emu::launch(dim3({config[0]}), dim3({config[1]}), {shared}, [&] {{ {s[k:j]}({s[end + 4:q]}); }})"
        i = q + 1
    return out + s[i:]


source = open(sys.argv[1]).read()
source = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1 *const \2 = (\1 *)emu::dynamic;", source)
with open(sys.argv[2], "w") as f:
    f.write('#include "tests/emulated/emu/emu.h"\n' + launches(source))
