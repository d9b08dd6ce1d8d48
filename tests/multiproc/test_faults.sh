#!/usr/bin/env bash
# What ends one rank ends all, names it and loses no checkpoint. On 4 ranks, at seeded moments: kill -9 of each rank in turn, SIGSTOP of each,
# SIGTERM of one, a full disk at rank 0, a rank that never begins, or has another recipe, other data, another program; a damaged checkpoint at resume. After each:
# the exit code, the message, how long it took (30 s at most), nothing left running, and a resume that ends at the bytes of the
# run that nobody disturbed.
#   LSA_FAULTS=N   rounds of kills and stops (default 1; 50 by hand)      LSA_SEED=N   another sequence
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/ranks.sh
rounds=${LSA_FAULTS:-1}
RANDOM=${LSA_SEED:-20260616}
deadline=4
"$bin/lsa-dump" synth --out "$work/shards" --docs 12 --tokens 1024 --layers 2 --seed 3 >/dev/null || bad synth
steps=400
opts=(--recipe recipes/smoke.yaml --data "$work/shards" --device cpu --set data.virtual_shards=4 --set train.batch=16 --set train.steps=$steps
      --set train.eval_every=100 --set train.save_every=20 --set train.log_every=1 --set train.keep=3 --deadline $deadline)
run=("$bin/lsa-train" run "${opts[@]}" --out "$work/run")
resume=("$bin/lsa-train" resume "$work/run" --device cpu --deadline $deadline)
launch 4 "${run[@]}" >/dev/null 2>&1 || bad "undisturbed run"
mv "$work/run" "$work/whole"
prints() { (cd "$1/ckpt" && find . -type f | LC_ALL=C sort | xargs sha256sum); }
prints "$work/whole" >"$work/want"

# The run is resumed on another number of ranks and ends at the undisturbed run's checkpoints; no more steps are done again than lie between two of them.
goes_on() { # what
    local before=0 latest=0
    before=$("$python" -c "import json, sys
print(max(json.loads(l)['step'] for l in open(sys.argv[1]) if l.endswith('}\n')))" "$work/run/metrics.jsonl")
    [ ! -e "$work/run/ckpt/latest" ] || latest=$((10#$(sed 's/step_//' "$work/run/ckpt/latest")))
    [ $((before - latest)) -le 40 ] || bad "$1: at step $before the last checkpoint was $latest" # one interval, and the write of one
    launch 2 "${resume[@]}" >"$work/log" 2>&1 || { bad "$1: resume failed"; cat "$work/log"; }
    prints "$work/run" >"$work/got"
    # a stop between two checkpoints leaves one more, which may outlive an older one
    if [ -n "${stopped:-}" ]; then grep -E 'latest|best|step_0*400/' "$work/want"; else cat "$work/want"; fi >"$work/wanted"
    if [ -n "${stopped:-}" ]; then grep -E 'latest|best|step_0*400/' "$work/got"; else cat "$work/got"; fi >"$work/found"
    diff "$work/wanted" "$work/found" || bad "$1: the checkpoints differ from the undisturbed run's"
}
until_step() { # N: has been reported
    local i
    for i in $(seq 600); do
        grep -q "\"step\": $1," "$work/run/metrics.jsonl" && return
        sleep 0.01
    done
    bad "step $1 was not reached"
}
slowest=0
disturb() { # signal rank code pattern
    local pid t
    rm -rf "$work/run"
    start 4 "${run[@]}"
    pid=$(rank_pid "$2")
    until_step $((1 + RANDOM % 250))
    sleep "0.0$((RANDOM % 10))" # so that it falls anywhere in a step, a save, an evaluation
    [ -n "$pid" ] || { bad "rank $2 is not there any more"; cat "$work/log"; ended 0; return; }
    t=$(date +%s%N)
    kill "-$1" "$pid"
    ended "$3" 30
    t=$((($(date +%s%N) - t) / 1000000))
    [ $t -le $slowest ] || slowest=$t
    says "$4"
    [ "$1" != TERM ] || [ "$(grep -c interrupted: "$work/log")" = 1 ] || { bad "not exactly one rank says that it stopped"; cat "$work/log"; }
    stopped=$([ "$1" != TERM ] || echo 1) goes_on "SIG$1 to rank $2"
}
for round in $(seq "$rounds"); do
    for r in 0 1 2 3; do disturb KILL $r "not 0" "rank $r \(process [0-9]+ on .*\) died"; done
    r=$((round % 4))
    disturb STOP $r "not 0" "rank $r \(process [0-9]+ on .*\) has been silent for $deadline s"
    disturb TERM $((RANDOM % 4)) 5 "stopped at step [0-9]+ of $steps, saved"
done
echo "$((rounds * 4)) kills, $rounds stops, $rounds terminations: everyone gone within $slowest ms (deadline $deadline s)"

# preemption: mpirun hands SIGUSR1 on to its ranks (SIGTERM would leave them one second)
rm -rf "$work/run"
start 4 "${run[@]}"
kill -USR1 "$job"
ended 5 30
says "stopped at step [0-9]+ of $steps, saved"
stopped=1 goes_on "SIGUSR1 to mpirun"

# disk full at rank 0 (a file-size limit that the larger model's checkpoint exceeds): all leave with 4, the last good checkpoint is named
cat >"$work/limited" <<'SH'
#!/usr/bin/env bash
[ "$OMPI_COMM_WORLD_RANK" != 0 ] || ulimit -f 100
exec "$@"
SH
chmod +x "$work/limited"
rm -rf "$work/run"
cp -r "$work/whole" "$work/run"
rm -rf "$work/run/ckpt/step_00000400"
echo step_00000380 >"$work/run/ckpt/latest"
rc=0
mpi+=(--mca btl tcp,self) # the limit would hit MPI's shared memory too
launch 4 "$work/limited" "${resume[@]}" >"$work/log" 2>&1 || rc=$?
[ $rc = 4 ] || bad "disk full: exit $rc"
says "rank 0: the checkpoint of step 400 is not written; step 380 is the last good one"
says "error: (rank [123]: )?rank 0 \(.*failed: the checkpoint of step 400"
goes_on "disk full"

# one damaged file of the latest checkpoint: the one before is taken, with a warning
printf 'XX' | dd of="$work/run/ckpt/step_00000400/optim.safetensors" bs=1 seek=2000 conv=notrunc 2>/dev/null
goes_on "damaged checkpoint"
says "optim.safetensors.*going on from .*step_00000380' instead"

# a rank that never begins: the others say so after six deadlines instead of waiting in MPI for ever
printf '#!/usr/bin/env bash\n[ "$OMPI_COMM_WORLD_RANK" != 1 ] || exec sleep 60\nexec "$@"\n' >"$work/late"
chmod +x "$work/late"
rm -rf "$work/run"
rc=0 t=$SECONDS
launch 2 "$work/late" "$bin/lsa-train" run "${opts[@]}" --deadline 1 --out "$work/run" >"$work/log" 2>&1 || rc=$?
[ $rc = 1 ] && [ $((SECONDS - t)) -le 25 ] || { bad "a rank that never begins: exit $rc after $((SECONDS - t)) s"; cat "$work/log"; }
says "rank 0 of 2 \(.*, started by mpirun .*\) has not met the others within 6 s"

# one rank is not like the others: nobody begins
differs() { # text; the launcher script is in $work/odd
    local rc=0
    chmod +x "$work/odd"
    rm -rf "$work/run"
    launch 4 "$work/odd" "${run[@]}" >"$work/log" 2>&1 || rc=$?
    [ $rc = 2 ] || { bad "exit $rc, expected 2: $1"; cat "$work/log"; }
    says "$1"
    [ ! -e "$work/run/run.json" ] || bad "$1: the run began all the same"
}
printf '#!/usr/bin/env bash\n[ "$OMPI_COMM_WORLD_RANK" != 2 ] || exec "$@" --set optim.lr=1e-2\nexec "$@"\n' >"$work/odd"
differs "the recipe of rank 2 differs"
"$bin/lsa-dump" synth --out "$work/other" --docs 12 --tokens 1024 --layers 2 --seed 4 >/dev/null
printf '#!/usr/bin/env bash\n[ "$OMPI_COMM_WORLD_RANK" != 1 ] || exec "${@//%s/%s}"\nexec "$@"\n' "${work//\//\\/}\\/shards" "${work//\//\\/}\\/other" >"$work/odd"
differs "the content of the shard folder of rank 1 differs"
# another program: the same one with another commit written into its version text
"$python" - "$bin/lsa-train" "$work/lsa-train-odd" <<'PY'
import re, sys
b = open(sys.argv[1], "rb").read()
c = re.sub(rb"(\ncommit   )[^\n]{4}", rb"\1ODD!", b)
assert b != c
open(sys.argv[2], "wb").write(c)
PY
chmod +x "$work/lsa-train-odd"
printf '#!/usr/bin/env bash\nprogram=$1\nshift\n[ "$OMPI_COMM_WORLD_RANK" != 3 ] || exec %s "$@"\nexec "$program" "$@"\n' "$work/lsa-train-odd" >"$work/odd"
differs "the program \(version, commit or features\) of rank 3 differs"
verdict
