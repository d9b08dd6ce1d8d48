"""The training loop against PyTorch: five short runs (every loss, reference and lookahead mode) on the ref and cpu columns follow the
curves of tests/fixtures/reference_curve.json, made by make_reference_curve.py, within 1e-4 relative at every step, from the same samples."""
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file

SRC = os.environ.get("LSA_SRC", ".")
FIXTURE = os.path.join(SRC, "tests/fixtures/reference_curve.json")
LIMIT = 1e-4

if not os.path.exists(FIXTURE):
    print("skipped: tests/fixtures/reference_curve.json is not there; make it with tests/oracle/make_reference_curve.py")
    sys.exit(77)
want = json.load(open(FIXTURE))["cases"]
failed = len(want) < 5
for device in os.environ.get("LSA_CURVE_DEVICES", "ref cpu").split():
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(["bash", os.path.join(SRC, "tests/oracle/make_trace.sh"), tmp, device], check=True)
        for name, case in sorted(want.items()):
            meta = json.load(open(os.path.join(tmp, name + ".json")))
            got, ref = load_file(os.path.join(tmp, name + ".safetensors"))["loss"], np.array(case["loss"])
            same = meta["samples_sha256"] == case["samples_sha256"]
            worst = np.max(np.abs(got - ref) / np.abs(ref)) if got.shape == ref.shape else np.nan
            ok = bool(same and worst <= LIMIT)  # a NaN does not pass
            failed = failed or not ok
            print(f"{device:4s} {name:18s} {len(got):4d} steps, worst relative difference {worst:.2e}, samples "
                  f"{'the same' if same else 'DIFFER from the fixture'}: {'ok' if ok else 'FAILED'}")
sys.exit(1 if failed else 0)
