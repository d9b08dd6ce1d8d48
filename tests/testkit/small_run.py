"""What the end-to-end tests of learned additions to the score share: programs, a small training run, equal files, a run that lost its end."""
import os
import shutil
import subprocess
import sys

BIN = os.environ["LSA_BIN"]
STEPS = 12
STEP = f"ckpt/step_{STEPS:08d}"


def run(program, *args, code=0, say=""):
    """Runs one of lsa's programs; its standard output. Ends the test unless it exits with `code` and says `say`."""
    p = subprocess.run([f"{BIN}/{program}", *args], capture_output=True, text=True)
    if p.returncode != code or say not in p.stdout + p.stderr:
        sys.exit(f"{program} {' '.join(args)}: exit {p.returncode}, expected {code} and '{say}'\n{p.stdout}{p.stderr}")
    return p.stdout


def train(work, out, *sets, code=0, say="", more=()):
    """STEPS steps of recipes/smoke.yaml on the shards in work."""
    args = ["run", "--recipe", "recipes/smoke.yaml", "--data", f"{work}/shards", "--out", out, "--device", "cpu", *more]
    for s in (f"train.steps={STEPS}", "train.save_every=4", "train.keep=9", "train.eval_every=4", "data.virtual_shards=2", *sets):
        args += ["--set", s]
    return run("lsa-train", *args, code=code, say=say)


def same(a, b):
    if open(a, "rb").read() != open(b, "rb").read():
        sys.exit(f"{a} and {b} differ")


def resumes_alike(work):
    """The run in work/run, copied without its last steps and resumed, writes the same bytes."""
    shutil.copytree(f"{work}/run", f"{work}/again")
    shutil.rmtree(f"{work}/again/{STEP}")
    os.path.exists(f"{work}/again/ckpt/best") and os.remove(f"{work}/again/ckpt/best")
    open(f"{work}/again/ckpt/latest", "w").write(f"step_{STEPS - 4:08d}\n")
    run("lsa-train", "resume", f"{work}/again", "--device", "cpu")
    for f in ("model.safetensors", "optim.safetensors"):
        same(f"{work}/run/{STEP}/{f}", f"{work}/again/{STEP}/{f}")
