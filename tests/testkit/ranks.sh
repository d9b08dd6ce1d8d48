# Sourced by tests/multiproc/*.sh: several ranks on this machine. Skips (77) without MPI.
#   launch N command...   runs it on N ranks, at most LIMIT seconds (120)
#   start N command...    the same in the background; sets job (its process) and waits until $work/run/metrics.jsonl is there
#   rank_pid R            process id of rank R of the background job
#   ended CODE [SECONDS]  waits for the job: its exit code (any other than 0 if CODE is "not 0"), within SECONDS (30); output in $work/log
bin=${LSA_BIN:?}
python=${LSA_PYTHON:-python3}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
if "$bin/lsa-train" --version | grep -q 'MPI  *OFF' || ! command -v mpirun >/dev/null; then echo "skipped: no MPI in this build or on this machine"; exit 77; fi
work=$(mktemp -d /tmp/lsa-ranks-XXXXXX)
failed=0
bad() { echo "FAILED: $*"; failed=1; }
verdict() { [ $failed = 0 ] && echo "ok"; exit $failed; }
job=
clean_up() {
    local p
    [ -z "$job" ] || kill -KILL "$job" 2>/dev/null
    for p in $(pgrep -f "^$bin/lsa-train .*$work"); do kill -KILL "$p" 2>/dev/null; done # ours: this test's folder is in the command line
    rm -rf "$work"
}
trap clean_up EXIT
mpi=(mpirun --oversubscribe --mca btl_vader_single_copy_mechanism none)

launch() {
    local n=$1
    shift
    timeout --kill-after=5 "${LIMIT:-120}" "${mpi[@]}" -n "$n" "$@"
}
start() {
    local n=$1 i
    shift
    "${mpi[@]}" -n "$n" "$@" >"$work/log" 2>&1 &
    job=$!
    for i in $(seq 300); do
        [ -s "$work/run/metrics.jsonl" ] && return
        kill -0 "$job" 2>/dev/null || break
        sleep 0.1
    done
    bad "the run did not begin"
    cat "$work/log"
    exit 1
}
rank_pid() {
    local p
    for p in $(pgrep -f "^$bin/lsa-train .*$work"); do
        if tr '\0' '\n' <"/proc/$p/environ" 2>/dev/null | grep -qx "OMPI_COMM_WORLD_RANK=$1"; then echo "$p"; fi
    done
}
ended() {
    local want=$1 limit=${2:-30} t0=$SECONDS rc=0
    while kill -0 "$job" 2>/dev/null && [ $((SECONDS - t0)) -le "$limit" ]; do sleep 0.05; done
    if kill -0 "$job" 2>/dev/null; then
        bad "still running after $limit s"
        cat "$work/log"
        exit 1
    fi
    wait "$job" || rc=$?
    job=
    [ "$want" = "$rc" ] || { [ "$want" = "not 0" ] && [ $rc != 0 ]; } || { bad "exit $rc, expected $want"; cat "$work/log"; }
    local i left
    for i in $(seq 50); do # the launcher may be reaping the last of them
        left=$(pgrep -f "^$bin/lsa-train .*$work" || true)
        [ -z "$left" ] && return
        sleep 0.1
    done
    bad "processes are left: $left"
}
says() { grep -qE -- "$1" "$work/log" || { bad "'$1' is not in the output"; cat "$work/log"; }; }
