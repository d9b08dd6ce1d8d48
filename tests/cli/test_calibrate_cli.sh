#!/usr/bin/env bash
# lsa-export calibrate from outside: exit codes and one clear message for every kind of bad input, no half-written folder,
# weights untouched, the same bytes from any number of threads, shards without statistics.
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/expect.sh
export OMP_NUM_THREADS=2
teacher=recipes/mini/teacher
cal() { "$bin/lsa-export" calibrate "$@" --device cpu; }

expect 0 "Usage: lsa-export calibrate" "$bin/lsa-export" calibrate --help
"$bin/lsa-dump" synth --out "$work/train" --docs 4 --tokens 1088 --layers 2 --hidden 32 >/dev/null 2>&1
"$bin/lsa-dump" synth --out "$work/data" --docs 3 --tokens 2112 --layers 2 --hidden 32 >/dev/null 2>&1 || bad "synth"
"$bin/lsa-train" run --recipe recipes/smoke.yaml --data "$work/train" --out "$work/run" --device cpu --set train.steps=20 --set sample.val_documents=1 \
    >/dev/null 2>&1 || bad "train"
expect 0 "" "$bin/lsa-export" write "$work/run" --out "$work/ix" --licence "CC0 | test"
expect 0 '| licence | CC0 \| test |' "$bin/lsa-export" card "$work/ix"
expect 0 "Not calibrated" "$bin/lsa-export" card "$work/ix"
[ ! -e "$work/ix/calibration.svg" ] || bad "a plot without a calibration"

# what it refuses
expect 2 "--data" cal "$work/ix"
expect 1 "" cal "$work/ix" --data "$work/none"
expect 1 "not an exported indexer" cal "$work/run" --data "$work/data"
expect 2 "not calibrated" cal "$work/ix" --data "$work/data" --check
expect 2 "--documents" cal "$work/ix" --data "$work/data" --documents 3:3
expect 2 "--documents" cal "$work/ix" --data "$work/data" --documents 1:9
expect 2 "trained on" cal "$work/ix" --data "$work/train" --documents 0:4
expect 2 "trained on" cal "$work/ix" --data "$work/train" --documents 2:4
expect 2 "--fold" cal "$work/ix" --data "$work/data" --fold 0.07
expect 2 "--fold" cal "$work/ix" --data "$work/data" --fold -1
expect 2 "--fold-tokens" cal "$work/ix" --data "$work/data" --fold-tokens 4096
expect 2 "--check" cal "$work/ix" --data "$work/data" --check --fold 0.1
expect 2 "choose another --out" cal "$work/ix" --data "$work/data" --out recipes
"$bin/lsa-dump" synth --out "$work/short" --docs 2 --tokens 256 --layers 2 --hidden 32 >/dev/null 2>&1
expect 2 "longer than tail + tau" cal "$work/ix" --data "$work/short"
"$bin/lsa-dump" synth --out "$work/wide" --docs 2 --tokens 640 --layers 2 --hidden 64 >/dev/null 2>&1
expect 2 "hidden vectors of 64" cal "$work/ix" --data "$work/wide"
cp -r "$work/ix" "$work/foreign"
"$python" - "$work/foreign/indexer.safetensors" <<'PY'
import json, struct, sys
raw = open(sys.argv[1], "rb").read()
n = struct.unpack("<Q", raw[:8])[0]
h = json.loads(raw[8 : 8 + n])
t = json.loads(h["__metadata__"]["lsa.train"])
t["teacher_hash"] = "0123456789abcdef"
h["__metadata__"]["lsa.train"] = json.dumps(t)
text = json.dumps(h).encode()
open(sys.argv[1], "wb").write(struct.pack("<Q", len(text)) + text + raw[8 + n :])
PY
expect 2 "0123456789abcdef" cal "$work/foreign" --data "$work/data"
expect 2 "not calibrated" cal "$work/foreign" --data "$work/data" --check
sha256sum "$work"/ix/* >"$work/sums"
(ulimit -f 20; exec "$bin/lsa-export" calibrate "$work/ix" --data "$work/data" --device cpu >"$work/out" 2>&1)
rc=$?
[ $rc = 4 ] || { bad "disk full gave exit $rc"; cat "$work/out"; }
sha256sum --quiet -c "$work/sums" || bad "a failed calibration changed the folder"

# the held-out documents of the training run's own shards are what it takes by itself
expect 0 "held-out documents 3 to 3" cal "$work/ix" --data "$work/train" --out "$work/own"
expect 0 "" cal "$work/ix" --data "$work/train" --documents 0:4 --out "$work/all" --force

# another folder, the same bytes from one thread; in place; then the numbers of --check are those stored
cp -r "$work/ix" "$work/b"
expect 0 "threshold of the sum score" cal "$work/ix" --data "$work/data" --out "$work/a"
(OMP_NUM_THREADS=1 cal "$work/b" --data "$work/data" >/dev/null 2>&1) || bad "calibrate in place"
for f in indexer.safetensors golden.safetensors README.md calibration.svg; do cmp "$work/a/$f" "$work/b/$f" || bad "$f differs between thread counts"; done
expect 2 "--force" cal "$work/ix" --data "$work/data" --out "$work/a"
expect 0 "ok" "$bin/lsa-export" verify "$work/a" --checkpoint "$work/run"
expect 0 "## Calibration" "$bin/lsa-export" card "$work/a"
cal "$work/a" --data "$work/data" --check --json >"$work/check" 2>/dev/null || bad "--check"
cal "$work/a" --data "$work/data" --json --licence MIT >"$work/again" 2>/dev/null || bad "calibrate again"
expect 0 '| licence | MIT |' "$bin/lsa-export" card "$work/a"
"$python" - "$work" <<'PY' || bad "calibration of the folders"
import json, struct, sys

def read(path):
    raw = open(path, "rb").read()
    n = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + n])["__metadata__"], raw[8 + n :]

work = sys.argv[1]
before, after = read(work + "/ix/indexer.safetensors"), read(work + "/a/indexer.safetensors")
assert before[1] == after[1], "the weights changed"
assert "lsa.calibration" not in before[0]
c = json.loads(after[0]["lsa.calibration"])
check, again = json.load(open(work + "/check")), json.load(open(work + "/again"))
for a in c["ensembles"]:
    for kind in ("budget", "recall"):
        for x, y, z in zip(c["ensembles"][a][kind], check["ensembles"][a][kind], again["ensembles"][a][kind]):
            for k in ("kept", "recall", "captured", "kept_ci", "kept_p10_p90"):
                assert json.dumps(x[k]) == json.dumps(y[k]) == json.dumps(z[k]), (a, kind, k)
assert c["documents"] == 3 and c["knots"][0] == 128 and all(n == 3 for n in c["knot_documents"][:2])
PY

# shards without statistics: everything but captured mass
if "$bin/lsa-dump" run --teacher $teacher --tokens recipes/mini/val.u16 --needs recipes/mini/val.jsonl --documents 0:1 --no-stats --out "$work/nostats" >/dev/null 2>&1; then
    "$bin/lsa-export" import $teacher --out "$work/native" >/dev/null 2>&1
    expect 0 "" "$bin/lsa-export" write "$work/native" --out "$work/ixn"
    cal "$work/ixn" --data "$work/nostats" --json >"$work/json" 2>/dev/null || bad "no statistics"
    "$python" - "$work/json" <<'PY' || bad "calibration without statistics"
import json, sys
c = json.load(open(sys.argv[1]))
e = c["ensembles"]["max"]["budget"][1]
assert all(x is None for x in e["captured"] + e["captured_ci"]), e
assert all(x is None for x in e["kept_ci"]), "an interval over one document"
assert all(abs(x / 0.10 - 1) < 0.15 for x in e["kept"]) and all(0 < x <= 1 for x in e["recall"]), e
PY
    # weights without a bias cannot follow limits of both signs: refused, and nothing is written
    expect 1 "different signs (c0 " cal "$work/ixn" --data "$work/nostats" --fold 0.05 --fold-tokens 4096 --out "$work/folded"
    [ ! -e "$work/folded" ] || bad "a refused fold was written"
    # another teacher's shards
    expect 2 "" cal "$work/ixn" --data "$work/data"
else
    bad "dump without statistics"
fi

# a damaged calibration is refused by who reads it
"$python" - "$work/a/indexer.safetensors" <<'PY'
import json, struct, sys
raw = open(sys.argv[1], "rb").read()
n = struct.unpack("<Q", raw[:8])[0]
h = json.loads(raw[8 : 8 + n])
c = json.loads(h["__metadata__"]["lsa.calibration"])
c["knots"][1] = c["knots"][0]
h["__metadata__"]["lsa.calibration"] = json.dumps(c)
text = json.dumps(h).encode()
open(sys.argv[1], "wb").write(struct.pack("<Q", len(text)) + text + raw[8 + n :])
PY
expect 3 "knots must ascend" "$bin/lsa-export" card "$work/a"
expect 3 "knots must ascend" cal "$work/a" --data "$work/data" --check
verdict
