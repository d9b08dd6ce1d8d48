#!/usr/bin/env bash
# The GPU step (samples, products, scores, losses, gradients) against the `ref` column on random documents: heads 8 to 128, every loss,
# both candidate modes, the sm_90 and the portable kernels, fp8 queries, micro-batches. Skipped (77) without a GPU.
set -euo pipefail
. "$(dirname "$0")/../testkit/gpu.sh"
small=(--steps 0 --layers 2 --rank 64 --hidden 128)
work=$(mktemp -d /tmp/lsa-gpu-step-XXXXXX)
trap 'rm -rf "$work"' EXIT
at_once=$(($(nproc) < 8 ? $(nproc) : 8)) # each spends most of its time starting and in the ref column
slot() { while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do wait -n || true; done; }
check() {
    slot
    {
        if out=$(OMP_NUM_THREADS=2 "$bin/lsa-train" bench "${small[@]}" "$@" 2>&1); then
            echo "ok   $*: $(grep -oE '"(loss|captured)_error.*' <<<"$out")"
        else
            echo "FAIL $*: $out"
            touch "$work/failed"
        fi
    } &
}
for portable in false true; do
    p=(--set train.portable=$portable)
    for heads in 8 32 64 128; do
        check --case train --heads $heads --candidates 1000 --chunks 5000 "${p[@]}"
        check --case full --heads $heads --chunks 1500 "${p[@]}"
    done
    check --case train --heads 96 --candidates 128 --chunks 600 --set loss.kind=bce --set loss.smoothing=0.1 "${p[@]}"
    check --case train --heads 32 --candidates 300 --chunks 900 --set loss.kind=bpr "${p[@]}"
    check --case train --heads 32 --candidates 300 --chunks 900 --set loss.kind=margin "${p[@]}"
    check --case train --heads 32 --candidates 500 --chunks 2000 --set loss.on=sum "${p[@]}"
    check --case train --heads 32 --candidates 500 --chunks 2000 --set loss.kind=kl "${p[@]}"
    check --case full --heads 64 --chunks 1000 --set loss.kind=focal --set loss.balance=true --set loss.on=layer "${p[@]}"
    check --case full --heads 64 --chunks 1000 --set loss.on=layer "${p[@]}"
    check --case full --heads 32 --chunks 1300 --set model.continuation=16 "${p[@]}"
    check --case full --heads 32 --chunks 1300 --set model.continuation=5 --set loss.kind=focal --set train.micro_batch=1 "${p[@]}"
    check --case full --heads 32 --layers 1 --chunks 700 --set model.continuation=64 --set loss.kind=bce "${p[@]}"
    check --case eval --heads 32 --chunks 3000 --set train.batch=16 --set model.continuation=16 --set sample.candidates=all --set loss.kind=kl --set loss.on=sum "${p[@]}"
    check --case train --heads 64 --candidates 640 --chunks 4000 --set train.precision=fp8 "${p[@]}"
    check --case train --heads 32 --candidates 640 --chunks 4000 --set train.micro_batch=1 "${p[@]}"
    check --case train --heads 32 --candidates 640 --chunks 4000 --set sample.hard_share=0.5 "${p[@]}"
    check --case eval --heads 32 --chunks 3000 --set train.batch=16 "${p[@]}"
    check --case train --heads 16 --candidates 640 --chunks 4000 --set sample.hard_share=1 --set loss.kind=kl --set loss.on=sum "${p[@]}"
done

# compute-sanitizer on every kernel of the step. cuBLASLt's own kernels are not ours to judge: racecheck names them.
if command -v compute-sanitizer >/dev/null; then
    sanitize() { # tool options...
        local tool=$1 log
        shift
        slot
        {
            log=$(OMP_NUM_THREADS=2 timeout 200 compute-sanitizer --tool "$tool" "$bin/lsa-train" bench "${small[@]}" "$@" 2>&1 || true)
            if grep -aE '(Error|Warning): ' <<<"$log" | grep -qav nvjet || ! grep -qa 'SUMMARY' <<<"$log" || ! grep -qa '"verify"' <<<"$log"; then
                echo "FAIL $tool $*"
                tail -n 20 <<<"$log"
                touch "$work/failed"
            else
                echo "ok   $tool $*"
            fi
        } &
    }
    for tool in memcheck racecheck initcheck; do
        for portable in false true; do
            sanitize $tool --case train --heads 128 --candidates 200 --chunks 300 --set train.portable=$portable
            sanitize $tool --case full --heads 32 --chunks 200 --set train.portable=$portable
            sanitize $tool --case full --heads 32 --chunks 200 --set model.continuation=16 --set train.portable=$portable
            sanitize $tool --case eval --heads 32 --chunks 200 --set train.batch=2 --set train.portable=$portable
            sanitize $tool --case train --heads 16 --candidates 130 --chunks 300 --set loss.kind=bpr --set sample.hard_share=0.5 \
                --set optim.moments=bf16 --set train.portable=$portable
        done
    done
else
    echo "compute-sanitizer is not installed: memory checks not run"
fi
wait
[ ! -e "$work/failed" ]
