#!/usr/bin/env bash
# SIGKILL at 30 seeded moments of a short run, each followed by resume: the checkpoints (every file, and which step latest and best
# name) and what is exported from them equal those of a run that was never touched. Kills come at random times, so they fall into steps, evaluations and saves.
#   LSA_KILLS=N   another number of kills        LSA_SEED=N   another sequence
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${LSA_BIN:?}
kills=${LSA_KILLS:-30}
seed=${LSA_SEED:-20260611}
work=$(mktemp -d /tmp/lsa-kill-XXXXXX)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1

"$bin/lsa-dump" synth --out "$work/shards" --docs 8 --tokens 1024 --layers 2 --seed 3 >/dev/null
opts=(--recipe recipes/smoke.yaml --data "$work/shards" --device cpu --set train.steps=150 --set train.batch=16 --set train.save_every=7
      --set train.eval_every=15 --set train.keep=2 --set model.heads=8 --set model.rank=64)
prints() { (cd "$1/ckpt" && find . -type f | LC_ALL=C sort | xargs sha256sum); }

export_of() { "$bin/lsa-export" write "$1" --out "$work/export" >/dev/null 2>&1; (cd "$work/export" && sha256sum *); rm -rf "$work/export"; }
"$bin/lsa-train" run "${opts[@]}" --out "$work/whole" >/dev/null 2>&1
prints "$work/whole" >"$work/want"
export_of "$work/whole" >>"$work/want"
t0=$(date +%s%N) # the second run is timed: the first one also warms the file cache
"$bin/lsa-train" run "${opts[@]}" --out "$work/timed" >/dev/null 2>&1
span=$((($(date +%s%N) - t0) / 1000)) # microseconds
echo "seed $seed: $kills kills in runs of $((span / 1000)) ms, $(wc -l <"$work/want") files"

RANDOM=$seed
landed=0 round=0
while [ "$landed" -lt "$kills" ]; do
    round=$((round + 1))
    [ "$round" -le $((kills * 3)) ] || { echo "only $landed of $kills kills landed"; exit 1; }
    run=$work/killed
    rm -rf "$run"
    # Up to three kills a run: the first in `run`, the next in `resume`.
    for part in 1 2 3; do
        if [ -e "$run/run.json" ]; then cmd=(resume "$run" --device cpu); else cmd=(run "${opts[@]}" --out "$run"); fi
        "$bin/lsa-train" "${cmd[@]}" >/dev/null 2>&1 &
        pid=$!
        us=$(((RANDOM * 32768 + RANDOM) % span))
        sleep "$(printf '0.%06d' $((us % 1000000)))"
        if kill -KILL $pid 2>/dev/null; then landed=$((landed + 1)); fi
        wait $pid 2>/dev/null || true
    done
    if [ -e "$run/run.json" ]; then cmd=(resume "$run" --device cpu); else cmd=(run "${opts[@]}" --out "$run"); fi
    "$bin/lsa-train" "${cmd[@]}" >"$work/log" 2>&1 || { echo "round $round: resume failed"; cat "$work/log"; exit 1; }
    prints "$run" >"$work/got"
    export_of "$run" >>"$work/got"
    if ! diff "$work/want" "$work/got"; then
        echo "round $round (LSA_SEED=$seed bash tests/fault/test_train_kill.sh): checkpoints differ from the uninterrupted run"
        exit 1
    fi
done
echo "ok: $landed kills in $round runs, every resumed run equals the uninterrupted one"
