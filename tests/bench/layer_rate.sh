#!/usr/bin/env bash
# A full-size layer on the GPU of this machine, from a prebuilt folder: correctness, then V4-Flash, then V4-Pro (which may
# take a larger card). layer_rate.sh BUILD [OUT]: JSON lines go to OUT (default: layer_rate in the current folder).
set -uo pipefail
cd "$(dirname "$0")/../.."
build=${1:?layer_rate.sh BUILD [OUT]} out=${2:-layer_rate}
mkdir -p "$out"
bad=0
step() { # seconds, name, command
    local limit=$1 name=$2 start=$SECONDS code
    shift 2
    timeout "$limit" "$@" >"$out/$name.out" 2>"$out/$name.err"
    code=$?
    echo "$name: exit $code after $((SECONDS - start)) s"
    cat "$out/$name.out"
    tail -3 "$out/$name.err" >&2
    [ $code = 0 ] || bad=1
}
step 60 judge "$build/tests/t_gpu_gpu_bf16"
step 150 flash "$build/bin/lsa-dump" bench --config tests/fixtures/v4-flash/config.json --json
step 60 pro "$build/bin/lsa-dump" bench --config tests/fixtures/v4-pro/config.json --json --wave-tokens 0 --memory-cap 130G
exit $bad
