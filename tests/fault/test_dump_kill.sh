#!/usr/bin/env bash
# SIGKILL at 30 seeded moments of lsa-dump on the mini teacher, each followed by resume: every file of the shard folder equals that of a
# run that was never touched.
#   LSA_KILLS=N   another number of kills        LSA_SEED=N   another sequence
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${LSA_BIN:?}
kills=${LSA_KILLS:-30}
seed=${LSA_SEED:-20260612}
work=$(mktemp -d /tmp/lsa-dump-kill-XXXXXX)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1

"${LSA_PYTHON:-python3}" - "$work/tokens.jsonl" <<'PY'
import array, json, sys
ids = array.array("H")
ids.frombytes(open("recipes/mini/train.u16", "rb").read(2 * 8192))
with open(sys.argv[1], "w") as f:
    for i in range(10):
        print(json.dumps({"tokens": list(ids[i * 500 : i * 500 + 300 + 40 * i])}), file=f)
PY
opts=(--teacher recipes/mini/teacher --tokens "$work/tokens.jsonl" --shard-bytes 300K)
prints() { (cd "$1" && find . -type f | LC_ALL=C sort | xargs sha256sum); }

"$bin/lsa-dump" run "${opts[@]}" --out "$work/warm" >/dev/null 2>&1
t0=$(date +%s%N)
"$bin/lsa-dump" run "${opts[@]}" --out "$work/whole" >/dev/null 2>&1
span=$((($(date +%s%N) - t0) / 1000)) # microseconds
prints "$work/whole" >"$work/want"
shards=$(grep -c '\.h5$' "$work/want")
[ "$shards" -ge 4 ] || { echo "only $shards shards: the kills would fall into one"; exit 1; }
echo "seed $seed: $kills kills in runs of $((span / 1000)) ms, $shards shards"

RANDOM=$seed
landed=0 round=0
go_on() { if [ -e "$work/killed/manifest.json" ]; then cmd=(resume "$work/killed"); else cmd=(run "${opts[@]}" --out "$work/killed"); fi; }
while [ "$landed" -lt "$kills" ]; do
    round=$((round + 1))
    [ "$round" -le $((kills * 3)) ] || { echo "only $landed of $kills kills landed"; exit 1; }
    rm -rf "$work/killed"
    for part in 1 2 3; do # up to three kills a run: the first in run, the next in resume
        go_on
        "$bin/lsa-dump" "${cmd[@]}" >/dev/null 2>&1 &
        pid=$!
        us=$(((RANDOM * 32768 + RANDOM) % span))
        sleep "$(printf '%d.%06d' $((us / 1000000)) $((us % 1000000)))"
        if kill -KILL $pid 2>/dev/null; then landed=$((landed + 1)); fi
        wait $pid 2>/dev/null || true
    done
    go_on
    "$bin/lsa-dump" "${cmd[@]}" >"$work/log" 2>&1 || { echo "round $round: resume failed"; cat "$work/log"; exit 1; }
    prints "$work/killed" >"$work/got"
    if ! diff "$work/want" "$work/got"; then
        echo "round $round (LSA_SEED=$seed bash tests/fault/test_dump_kill.sh): shards differ from the uninterrupted run"
        exit 1
    fi
done
"$bin/lsa-dump" verify "$work/killed" >/dev/null
echo "ok: $landed kills in $round runs, every resumed folder equals the uninterrupted one"
