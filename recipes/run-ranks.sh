#!/usr/bin/env bash
# Starts lsa-train on several ranks and starts it again when a rank is lost:
#   recipes/run-ranks.sh [--max-restarts N] [--launcher "COMMAND..."] [its options] -- lsa-train run|resume ...
# The launcher is mpirun unless given, such as "srun --mpi=pmix"; --launcher "echo mpirun" only prints what would be started.
# A restart resumes from the latest checkpoint; it happens after a lost rank (exit 1, or a signal), never after a wrong recipe, a bad file,
# a full disk or numbers that are not finite. SIGTERM, SIGINT and SIGUSR1 (Slurm: --signal=B:USR1@60) reach every rank as a wish to stop: saved,
# exit 5. A launcher that does not end although its ranks on this host are gone (a cut network) is killed after 10 s.
set -uo pipefail
restarts=0
launcher=(mpirun)
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
    --max-restarts) restarts=${2:-}; shift ;;
    --launcher) read -ra launcher <<<"${2:-}"; shift ;;
    *) options+=("$1") ;;
    esac
    shift
done
[[ $restarts =~ ^[0-9]+$ ]] || { echo "$0: --max-restarts '$restarts' is not a number" >&2; exit 2; }
command -v "${launcher[0]:-}" >/dev/null || { echo "$0: the launcher '${launcher[0]:-}' is not on this machine" >&2; exit 2; }
[ "${1:-}" = -- ] && [ $# -ge 3 ] || { echo "usage: $0 [--max-restarts N] [--launcher \"COMMAND...\"] [its options] -- lsa-train run|resume ..." >&2; exit 2; }
shift
first=("$@") program=$1 verb=$2

run_folder=
carried=() # options that a resume understands
for ((i = 2; i < ${#first[@]}; i++)); do
    case ${first[i]} in
    --out) run_folder=${first[i + 1]:-} ;;
    --out=*) run_folder=${first[i]#*=} ;;
    --device | --deadline | --ranks) carried+=("${first[i]}" "${first[i + 1]:-}") ;;
    --device=* | --deadline=* | --ranks=*) carried+=("${first[i]}") ;;
    --*) ;;
    *) [ "$verb" != resume ] || [ -e "${first[i]}/run.json" ] && run_folder=${run_folder:-${first[i]}} ;;
    esac
done

job= stopping=
pass_on() { stopping=1; [ -z "$job" ] || kill -USR1 "$job" 2>/dev/null; }
trap pass_on TERM INT USR1

once() { # command...: sets rc
    local seen= gone=0 poll=0.2
    "${launcher[@]}" "${options[@]}" "$@" &
    job=$!
    while kill -0 "$job" 2>/dev/null; do
        sleep $poll
        if pgrep -P "$job" -f "$(basename "$program")" >/dev/null; then
            seen=1 gone=0
        elif [ -n "$seen" ] && [ $((gone += 1)) -gt 50 ]; then
            echo "run-ranks: the ranks of this host are gone, but ${launcher[0]} is not (another host cannot be reached): killing it" >&2
            kill -KILL $(pgrep -P "$job") "$job" 2>/dev/null
        fi
    done
    wait "$job"
    rc=$?
    job=
}

command=("${first[@]}")
for ((attempt = 0; ; attempt++)); do
    once "${command[@]}"
    [ $rc = 1 ] || [ $rc -gt 128 ] || exit $rc
    [ -z "$stopping" ] && [ $attempt -lt "$restarts" ] || exit $rc
    if [ -n "$run_folder" ] && [ -e "$run_folder/run.json" ]; then command=("$program" resume "$run_folder" "${carried[@]}"); fi
    echo "run-ranks: exit $rc; restart $((attempt + 1)) of $restarts: ${command[*]}" >&2
done
