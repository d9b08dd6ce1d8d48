#!/usr/bin/env bash
# Index arithmetic beyond 2^31: 2.3e9 logits and 2.3e9 bytes of keys a document. The whole batch at once against parts that stay below:
# same loss and gradient norm. Needs 40 GiB of GPU memory and 10 GiB of the host's. Skipped (77) without.
set -euo pipefail
. "$(dirname "$0")/../testkit/gpu.sh"
[[ $(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits | head -1) -gt 40000 ]] || { echo "skipped: less than 40 GiB of GPU memory"; exit 77; }
run() { "$bin/lsa-train" bench --case full --layers 12 --heads 8 --rank 64 --hidden 64 --chunks 1500032 --steps 1 --no-verify --set train.batch=128 "$@"; }
whole=$(run)
parts=$(run --set train.micro_batch=16)
"$python" - "$whole" "$parts" <<'PY'
import json, sys
a, b = (json.loads(text.splitlines()[0]) for text in sys.argv[1:3])
ok = all(abs(a[k] - b[k]) <= 1e-4 * abs(b[k]) for k in ("loss", "grad_norm"))
print("whole", a["loss"], a["grad_norm"], "parts", b["loss"], b["grad_norm"], "ok" if ok else "FAILED")
sys.exit(not ok)
PY
