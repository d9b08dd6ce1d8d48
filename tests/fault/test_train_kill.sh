#!/usr/bin/env bash
# SIGKILL at 30 seeded moments of a short run, each followed by resume: the checkpoints (every file, and which step latest and best
# name) and what is exported from them equal those of a run that was never touched. Kills come at random times, so they fall into steps, evaluations and saves.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/kill.sh
bin=${LSA_BIN:?}
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

command_line() {
    if [ -e "$work/killed/run.json" ]; then cmd=("$bin/lsa-train" resume "$work/killed" --device cpu); else cmd=("$bin/lsa-train" run "${opts[@]}" --out "$work/killed"); fi
}
left_behind() { prints "$work/killed"; export_of "$work/killed"; }
kill_loop "${LSA_SEED:-20260611}" checkpoints
