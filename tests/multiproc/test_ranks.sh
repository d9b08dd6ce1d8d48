#!/usr/bin/env bash
# The number of ranks decides nothing: 2 and 4 ranks give the bytes of 1 rank after 50 steps (parameters, moments, state, losses, evaluations),
# for every kind of loss, with the optimizer state whole or sharded; a chain of resumes on 4, 2 and 3 ranks equals the uninterrupted
# run; evaluation on 3 ranks prints what 1 rank prints; numbers that do not divide are refused with the nearest that do.
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/ranks.sh
"$bin/lsa-dump" synth --out "$work/shards" --docs 20 --tokens 1024 --layers 3 --seed 3 >/dev/null || bad synth
run=("$bin/lsa-train" run --recipe recipes/smoke.yaml --data "$work/shards" --device cpu --set sample.val_documents=5 --set train.steps=50
     --set train.eval_every=25 --set train.save_every=50 --set model.heads=8 --set model.rank=48 --set train.log_every=1)
last=ckpt/step_00000050

same() { # a b [also state.json]: the files of the last checkpoint, and all losses
    local f
    for f in model.safetensors optim.safetensors ${3:-}; do cmp "$work/$1/$last/$f" "$work/$2/$last/$f" || bad "$1 and $2 differ in $f"; done
    "$python" - "$work/$1/metrics.jsonl" "$work/$2/metrics.jsonl" <<'PY' || bad "$1 and $2 report other losses or evaluations"
import json, sys
a, b = ([json.loads(x) for x in open(p)] for p in sys.argv[1:])
assert len(a) == len(b) == 52, (len(a), len(b))
for x, y in zip(a, b):
    x.pop("windows_per_s", None), y.pop("windows_per_s", None)
    assert x == y, (x, y)
assert len({x["loss"] for x in a if "loss" in x}) == 50
PY
}
check() { # name options...
    local name=$1 n
    shift
    "${run[@]}" "$@" --out "$work/$name-1" >"$work/log" 2>&1 || { bad "$name, 1 rank"; cat "$work/log"; }
    for n in 2 4; do
        launch $n "${run[@]}" "$@" --out "$work/$name-$n" >"$work/log" 2>&1 || { bad "$name, $n ranks"; cat "$work/log"; }
        same "$name-1" "$name-$n" state.json
    done
    launch 4 "${run[@]}" "$@" --set optim.zero1=true --out "$work/$name-z" >"$work/log" 2>&1 || { bad "$name, sharded"; cat "$work/log"; }
    same "$name-1" "$name-z"
    echo "$name: 1, 2, 4 ranks and sharded moments: the same bytes"
}
check kl --set data.virtual_shards=8 --set train.batch=32
check focal --set data.virtual_shards=4 --set train.batch=12 --set loss.kind=focal --set loss.on=layer --set sample.candidates=sampled \
    --set sample.order=shuffled --set train.pool_mib=1 --set optim.clip=0.05 --set eval.metric=f1
check bpr --set data.virtual_shards=4 --set train.batch=8 --set loss.kind=bpr --set sample.candidates=sampled --set sample.max_pos=16
check mass --set data.virtual_shards=4 --set train.batch=16 --set loss.by_mass=true --set loss.on=layer
check continuation --set data.virtual_shards=4 --set train.batch=8 --set model.continuation=5 --set model.prior=true --set optim.clip=0.05
cmp -s "$work/kl-1/$last/model.safetensors" "$work/mass-1/$last/model.safetensors" && bad "the cases do not differ: the comparison sees nothing"

# ranks that meet through a file, as torchrun or srun number them; one that an earlier run left is passed over
echo "lsa-ranks/1 3 0123456789abcdef 1 127.0.0.1" >"$work/meet"
pids=
for rank in 2 1 0; do
    RANK=$rank WORLD_SIZE=3 "${run[@]}" --set data.virtual_shards=12 --set train.batch=24 --set optim.zero1=true --ranks "file:$work/meet" \
        --out "$work/file-3" >"$work/log.$rank" 2>&1 &
    pids="$pids $!"
done
for p in $pids; do wait "$p" || { bad "3 ranks over a file"; cat "$work"/log.*; }; done
"${run[@]}" --set data.virtual_shards=12 --set train.batch=24 --out "$work/file-1" >/dev/null 2>&1
same file-1 file-3
[ ! -e "$work/meet" ] || bad "the file of the meeting is left"
rc=0
RANK=1 WORLD_SIZE=2 "${run[@]}" --ranks "file:$work/meet" --deadline 1 --out "$work/none" >"$work/log" 2>&1 || rc=$?
{ [ $rc = 1 ] && grep -q "rank 1 of 2 .* has not met the others" "$work/log"; } || { bad "a rank alone: exit $rc"; cat "$work/log"; }
rc=0
"${run[@]}" --ranks "file:$work/meet" --out "$work/none" >"$work/log" 2>&1 || rc=$?
{ [ $rc = 2 ] && grep -q "set RANK and WORLD_SIZE" "$work/log"; } || { bad "no numbers: exit $rc"; cat "$work/log"; }

# threads of a rank decide nothing either
OMP_NUM_THREADS=3 "${run[@]}" --set data.virtual_shards=8 --set train.batch=32 --out "$work/threads" >/dev/null 2>&1
same kl-1 threads state.json

# elastic resume, V = 12: 20 steps on 4 ranks, to 35 on 2, to 50 on 3 with sharded moments on the way
twelve=("${run[@]}" --set data.virtual_shards=12 --set train.batch=24 --set optim.zero1=true --set model.continuation=5 --set model.prior=true)
"${twelve[@]}" --out "$work/whole" >"$work/log" 2>&1 || { bad "V = 12, 1 rank"; cat "$work/log"; }
# a run that saves at 20 and 35 and loses what came after is what an interruption leaves
launch 4 "${twelve[@]}" --set train.save_every=5 --set train.keep=99 --out "$work/chain" >/dev/null 2>&1 || bad "V = 12, 4 ranks"
rewind() { (cd "$work/chain/ckpt" && for d in step_*; do [ "$((10#${d#step_}))" -le "$1" ] || rm -r "$d"; done && printf 'step_%08d\n' "$1" >latest && rm -f best); }
rewind 20
launch 2 "$bin/lsa-train" resume "$work/chain" --device cpu >"$work/log" 2>&1 || { bad "resume on 2 ranks"; cat "$work/log"; }
rewind 35
launch 3 "$bin/lsa-train" resume "$work/chain" --device cpu >"$work/log" 2>&1 || { bad "resume on 3 ranks"; cat "$work/log"; }
for f in model.safetensors optim.safetensors; do cmp "$work/whole/$last/$f" "$work/chain/$last/$f" || bad "the chain 4, 2, 3 differs in $f"; done
grep -q '"step": 36' "$work/chain/metrics.jsonl" || bad "the chain did not pass step 36"

# evaluation: 5 documents on 1 and 3 ranks
"$bin/lsa-train" eval "$work/kl-1" --data "$work/shards" --held-out --device cpu --json >"$work/e1" || bad "eval"
launch 3 "$bin/lsa-train" eval "$work/kl-1" --data "$work/shards" --held-out --device cpu --json >"$work/e3" || bad "eval on 3 ranks"
cmp "$work/e1" "$work/e3" || bad "evaluation differs on 3 ranks"

# refusals: one exit code, the numbers that would do
refused() { # ranks code text options...
    local n=$1 code=$2 text=$3 rc=0
    shift 3
    launch "$n" "${run[@]}" --out "$work/none" "$@" >"$work/log" 2>&1 || rc=$?
    [ $rc = "$code" ] || bad "exit $rc, expected $code: $*"
    grep -qF -- "$text" "$work/log" || { bad "'$text' is not in the output of: $*"; cat "$work/log"; }
    [ ! -e "$work/none" ] || bad "a refused run left its folder"
}
refused 3 2 "3 ranks do not divide 8 virtual shards: start 1, 2, 4, 8 ranks, or set data.virtual_shards to 6 or 9" --set data.virtual_shards=8 --set train.batch=8
refused 2 2 "the nearest are 16 or 24" --set data.virtual_shards=8 --set train.batch=20
refused 2 2 "expected auto, self, mpi or file:PATH" --ranks sideways
[ -z "$(RANK=0 WORLD_SIZE=2 "${run[@]}" --out "$work/none" 2>&1 | grep -v 'torchrun started 2 processes')" ] || bad "torchrun's variables alone are not refused"

# one rank needs no launcher, and mpirun -n 1 is one rank
launch 1 "${run[@]}" --set data.virtual_shards=8 --set train.batch=32 --out "$work/alone" >/dev/null 2>&1 || bad "mpirun -n 1"
same kl-1 alone state.json
verdict
