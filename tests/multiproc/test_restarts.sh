#!/usr/bin/env bash
# recipes/run-ranks.sh: two lost ranks, two restarts, the bytes of a run that lost none; no restart after a wrong recipe; the restarts are
# counted; SIGTERM to it stops the run with everything saved.
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/ranks.sh
"$bin/lsa-dump" synth --out "$work/shards" --docs 12 --tokens 1024 --layers 2 --seed 3 >/dev/null || bad synth
opts=(--recipe recipes/smoke.yaml --data "$work/shards" --device cpu --deadline 4 --set data.virtual_shards=4 --set train.batch=16
      --set train.steps=400 --set train.eval_every=100 --set train.save_every=20 --set train.log_every=1)
launch 2 "$bin/lsa-train" run "${opts[@]}" --out "$work/whole" >/dev/null 2>&1 || bad "undisturbed run"

begin() { # run-ranks options...
    rm -rf "$work/run"
    bash recipes/run-ranks.sh "$@" --oversubscribe -n 4 -- "$bin/lsa-train" run "${opts[@]}" --out "$work/run" >"$work/log" 2>&1 &
    job=$!
}
until_step() { # N: the run has reported it
    local i
    for i in $(seq 300); do
        grep -q "\"step\": $1," "$work/run/metrics.jsonl" 2>/dev/null && return
        sleep 0.05
    done
    bad "the run did not reach step $1"
    cat "$work/log"
}
kill_rank() { kill -KILL "$(rank_pid "$1")" || bad "rank $1 is not there"; }

begin --max-restarts 2
until_step 60
kill_rank 2
sleep 1
until_step 150
kill_rank 0
ended 0 60
says "restart 1 of 2.*lsa-train resume $work/run --device cpu --deadline 4"
says "restart 2 of 2"
for f in model.safetensors optim.safetensors state.json; do
    cmp "$work/whole/ckpt/step_00000400/$f" "$work/run/ckpt/step_00000400/$f" || bad "after two restarts $f differs"
done

begin --max-restarts 0
until_step 30
kill_rank 1
ended "not 0" 30
says "rank 1 .* died"
grep -q restart "$work/log" && bad "restarted although no restart was allowed"

opts+=(--set train.batch=17)
begin --max-restarts 3
ended 2 30
grep -q restart "$work/log" && bad "restarted after a wrong recipe"
unset 'opts[-1]' 'opts[-1]'

begin --max-restarts 3
until_step 30
kill -TERM "$job"
ended 5 30
says "stopped at step [0-9]+ of 400, saved"
verdict
