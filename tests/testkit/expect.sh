# For command-line tests, sourced after `set -uo pipefail`: expectations, a work folder, one verdict at the end.
#   expect CODE TEXT command...   the exit code, and TEXT in what was printed (both streams, kept in $work/out)
bin=${LSA_BIN:?}
python=${LSA_PYTHON:-build/venv/bin/python}
work=$(mktemp -d /tmp/lsa-cli-XXXXXX)
trap 'rm -rf "$work"' EXIT
failed=0
bad() { echo "FAILED: $*"; failed=1; }
expect() {
    local code=$1 text=$2 rc
    shift 2
    "$@" >"$work/out" 2>&1
    rc=$?
    [ "$rc" = "$code" ] || { bad "exit $rc, expected $code: $*"; cat "$work/out"; }
    grep -qF -- "$text" "$work/out" || { bad "'$text' is not in the output of: $*"; cat "$work/out"; }
    if [ "$code" != 0 ] && [ "$(grep -c 'error:' "$work/out")" -gt 1 ]; then bad "more than one error line: $*"; cat "$work/out"; fi
}
verdict() { [ $failed = 0 ] && echo "ok"; exit $failed; }
