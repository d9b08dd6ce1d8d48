#!/usr/bin/env bash
# The GPU step (samples, products, scores, losses, gradients) against the `ref` column on random documents: heads 8 to 128, every loss,
# both candidate modes, the sm_90 and the portable kernels, fp8 queries, micro-batches. Skipped (77) without a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${LSA_BIN:?}
skip() { echo "skipped: $*"; [[ ${LSA_REQUIRE:-} == *gpu* ]] && exit 1; exit 77; }
command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || skip "no GPU"
"$bin/lsa-train" --version | grep -q 'CUDA *OFF' && skip "built without CUDA"
small=(--steps 0 --layers 2 --rank 64 --hidden 128)
fail=0
check() {
    if out=$("$bin/lsa-train" bench "${small[@]}" "$@" 2>&1); then
        echo "ok   $*: $(grep -o '"loss_error.*' <<<"$out")"
    else
        echo "FAIL $*: $out"
        fail=1
    fi
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
    check --case train --heads 64 --candidates 640 --chunks 4000 --set train.precision=fp8 "${p[@]}"
    check --case train --heads 32 --candidates 640 --chunks 4000 --set train.micro_batch=1 "${p[@]}"
done
exit $fail
