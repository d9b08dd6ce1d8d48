#!/usr/bin/env bash
# SIGKILL at 20 seeded moments of lsa-dump over emulated GPU kernels, each followed by resume: weights resident or streamed, in waves of one
# document, of some, or of all, another choice after every kill. Every file of the shard folder equals that of a run that was never touched.
# Skipped (77) where the kernels are not emulated.
set -euo pipefail
cd "$(dirname "$0")/../.."
export LSA_KILLS=${LSA_KILLS:-20}
. tests/testkit/kill.sh
dump=${LSA_BUILD:?}/tests/t_ops_emulated_dump
[ -x "$dump" ] || { echo "skipped: no emulated kernels in this build"; exit 77; }
work=$(mktemp -d /tmp/lsa-gpu-dump-kill-XXXXXX)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=2

"${LSA_PYTHON:-python3}" tests/emulated/stored_teacher.py "$work/teacher" "$work/bad"
"${LSA_PYTHON:-python3}" - "$work/tokens.jsonl" <<'PY'
import json, random, sys
random.seed(3)
with open(sys.argv[1], "w") as f:
    for n in (20, 9, 24, 16, 5, 18):
        print(json.dumps({"tokens": [random.randrange(256) for _ in range(n)]}), file=f)
PY
prints() { (cd "$1" && find . -type f | LC_ALL=C sort | xargs sha256sum); }

"$dump" run "$work/warm" "$work/teacher" "$work/tokens.jsonl" 0 >/dev/null 2>&1
t0=$(date +%s%N)
"$dump" run "$work/whole" "$work/teacher" "$work/tokens.jsonl" 1 >/dev/null 2>&1
span=$((($(date +%s%N) - t0) / 1000)) # microseconds
prints "$work/whole" >"$work/want"
shards=$(grep -c '\.h5$' "$work/want")
[ "$shards" -ge 3 ] || { echo "only $shards shards: the kills would fall into one"; exit 1; }

waves=(0 1 30 1000)
command_line() {
    local wave=${waves[$((RANDOM % 4))]}
    if [ -e "$work/killed/manifest.json" ]; then cmd=("$dump" resume "$work/killed" "$wave"); else cmd=("$dump" run "$work/killed" "$work/teacher" "$work/tokens.jsonl" "$wave"); fi
}
left_behind() { prints "$work/killed"; }
kill_loop "${LSA_SEED:-20261201}" shards
