#!/usr/bin/env bash
# SIGKILL at 30 seeded moments of lsa-dump on the mini teacher, each followed by resume: every file of the shard folder equals that of a
# run that was never touched.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/kill.sh
bin=${LSA_BIN:?}
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

command_line() {
    if [ -e "$work/killed/manifest.json" ]; then cmd=("$bin/lsa-dump" resume "$work/killed"); else cmd=("$bin/lsa-dump" run "${opts[@]}" --out "$work/killed"); fi
}
left_behind() { prints "$work/killed"; }
kill_loop "${LSA_SEED:-20260612}" shards
"$bin/lsa-dump" verify "$work/killed" --recheck 2 >/dev/null
