#!/usr/bin/env bash
# Several GPUs of this host, measured: is it right, and how fast?
#   recipes/scaling.sh [--bin DIR] [--out DIR] [--ranks "1 2 4 8"] [--only check|speed] [--device cuda|cpu]
# check: losses on W GPUs against one GPU with the same windows (200 steps of bf16 products, gradients exchanged in f32 and bf16; several GPUs have no f32
# step), ZeRO-1 on and off, a run stopped on W and resumed on one, a rank killed. speed: the step of 8 layers, 128 heads, rank 2048, weak (1,024 and 256 windows a GPU) and
# strong (1,024 windows in all), with and without ZeRO-1, bf16 and f32 gradients, exchanges beside the backward pass and after it. Writes
# DIR/scaling.jsonl and DIR/scaling.md. Default: the sizes that this host has GPUs for. --device cpu: the check with CPU ranks, small.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=build/cuda/bin out=out/scaling sizes= only= device=cuda python=${LSA_PYTHON:-python3}
while [ $# -gt 0 ]; do
    case $1 in
    --bin) bin=${2:-} ;;
    --out) out=${2:-} ;;
    --ranks) sizes=${2:-} ;;
    --only) only=${2:-} ;;
    --device) device=${2:-} ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    shift 2
done
[ -x "$bin/lsa-train" ] || { echo "$0: no lsa-train in '$bin'; build it (cmake --preset cuda && cmake --build --preset cuda) or name its folder by --bin" >&2; exit 2; }
command -v mpirun >/dev/null || { echo "$0: no mpirun on this machine; install Open MPI" >&2; exit 2; }
if [ "$device" = cuda ]; then
    have=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || { echo "$0: no GPU here; --device cpu checks CPU ranks" >&2; exit 2; }
else
    have=$(nproc)
fi
if [ -z "$sizes" ]; then for w in 1 2 4 8; do [ $w -gt "$have" ] || sizes="$sizes $w"; done; fi
export NCCL_NVLS_ENABLE=0 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} # no NVLink multicast
[ "$(id -u)" != 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mkdir -p "$out"
work=$(mktemp -d "$out/work-XXXXXX")
trap 'rm -rf "$work"' EXIT
lines=$out/scaling.jsonl
: >"$lines"
note() { echo "$1" | tee -a "$lines"; }
fail() { echo "$0: $*" >&2; exit 1; }

# ---- is it right? ----
long=200 batch=64 rule=close shape=(--set model.heads=32 --set model.rank=256)
[ "$device" = cuda ] || { long=20 batch=16 rule=exact shape=(--set model.heads=8 --set model.rank=32); }
train() { # ranks (0: the plain step, no launcher) name steps options...
    local w=$1 name=$2 steps=$3 how=() ranks=self
    shift 3
    [ "$w" = 0 ] || how=(mpirun --oversubscribe --bind-to none -n "$w") ranks=mpi
    "${how[@]}" "$bin/lsa-train" run --data "$work/shards" --out "$work/$name" --device "$device" --ranks $ranks "${shape[@]}" --set train.batch=$batch \
        --set train.steps="$steps" --set train.log_every=1 --set train.eval_every="$steps" --set sample.val_documents=8 --set optim.warmup=10 \
        --set train.save_every=$((long / 2)) "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "the run '$name' failed"; }
}
like() { # name other rule case ranks. exact: every loss and the evaluation within 1e-5. close: the first loss and gradient norm that both have
    # within 1e-5, the mean of the last 50 losses and the evaluation within 2e-3 (bf16 weights amplify the last bits of a sum, step by step);
    # bf16: the same with 1e-3 for the norm, whose terms are rounded
    note "$("$python" - "$work/$1/metrics.jsonl" "$work/$2/metrics.jsonl" "$3" "$4" "$5" <<'PY'
import json, sys
a, b = ([json.loads(l) for l in open(p)] for p in sys.argv[1:3])
rule, case, ranks = sys.argv[3], sys.argv[4], int(sys.argv[5])
step = [{x["step"]: x for x in y if "loss" in x} for y in (a, b)]  # a resumed step counts, not the one before
both = sorted(set(step[0]) & set(step[1]))
off = lambda x, y: abs(x - y) / abs(y)
loss = [off(step[0][i]["loss"], step[1][i]["loss"]) for i in both]
first = [off(step[0][both[0]][k], step[1][both[0]][k]) for k in ("loss", "grad_norm")]
mean = off(*(sum(s[i]["loss"] for i in both[-50:]) for s in step))
held = off(*([x["eval"]["sum"]["captured"] for x in y if "eval" in x][-1] for y in (a, b)))
worst = max(loss + [held]) if rule == "exact" else max(mean, held)
allowed = 1e-5 if rule == "exact" else 2e-3
ok = len(both) >= 10 and max(step[0]) == max(step[1]) and first[0] <= 1e-5 and first[1] <= (1e-3 if rule == "bf16" else 1e-5) and worst <= allowed
print(json.dumps({"scaling": "check", "case": case, "gpus": ranks, "steps": len(both), "first": first[0], "first_norm": first[1], "worst": worst, "worst_step": max(loss), "allowed": allowed, "ok": ok}))
PY
    )"
    tail -n 1 "$lines" | grep -q '"ok": true' || fail "$4 on $5: not equal"
}
resumed() { # ranks name: the run's checkpoint of half its steps goes on alone
    local half
    half=$(printf 'step_%08d' $((long / 2)))
    cp -r "$work/$2" "$work/resumed"
    rm -rf "$work/resumed/ckpt/best" "$work/resumed/ckpt/$(printf 'step_%08d' $long)"
    sed -i "$((long / 2 + 1)),\$d" "$work/resumed/metrics.jsonl"
    echo "$half" >"$work/resumed/ckpt/latest"
    "$bin/lsa-train" resume "$work/resumed" --device "$device" --ranks self >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "resume of $1 ranks on one"; }
    sed -i "1,$((long / 2))d" "$work/resumed/metrics.jsonl"
    like resumed "$2" $rule "stopped at half, resumed on one" "$1"
    rm -rf "$work/resumed"
}
killed() { # ranks: the last one is killed
    local w=$1 job pid rc=0 t0
    mpirun --oversubscribe --bind-to none -n "$w" "$bin/lsa-train" run --data "$work/shards" --out "$work/killed" --device "$device" --ranks mpi "${shape[@]}" \
        --set train.steps=1000000 --set train.save_every=20 --set train.eval_every=0 --set train.batch=$batch --set sample.val_documents=8 >"$work/log" 2>&1 &
    job=$!
    for _ in $(seq 600); do [ -e "$work/killed/ckpt/latest" ] && break; sleep 0.1; done
    pid=$(for p in $(pgrep -f "lsa-train run .*$work/killed"); do
        if tr '\0' '\n' <"/proc/$p/environ" 2>/dev/null | grep -qx "OMPI_COMM_WORLD_RANK=$((w - 1))"; then echo "$p"; fi
    done | tail -n 1)
    t0=$(date +%s)
    kill -KILL "$pid"
    wait $job || rc=$?
    [ $rc != 0 ] && grep -q "rank $((w - 1))" "$work/log" && [ -e "$work/killed/ckpt/latest" ] || { cat "$work/log" >&2; fail "a killed rank of $w: exit $rc"; }
    note "{\"scaling\": \"check\", \"case\": \"a rank killed\", \"gpus\": $w, \"seconds\": $(($(date +%s) - t0)), \"exit\": $rc, \"ok\": true}"
    rm -rf "$work/killed"
}
check() {
    local w
    if [ "$device" = cuda ]; then
        "$bin/lsa-dump" synth --out "$work/shards" --docs 40 --tokens 4096 --layers 3 --hidden 256 --seed 5 >/dev/null 2>&1
    else
        "$bin/lsa-dump" synth --out "$work/shards" --docs 24 --tokens 1024 --layers 2 --hidden 64 --seed 5 >/dev/null 2>&1
    fi
    train 0 plain $long
    for w in $sizes; do
        train "$w" "whole-$w" $long
        like "whole-$w" plain $rule "gradients in f32" "$w"
        train "$w" "zero1-$w" $long --set optim.zero1=true
        like "zero1-$w" plain $rule "ZeRO-1, gradients in f32" "$w"
        if [ "$device" = cuda ]; then
            train "$w" "bf16-$w" $long --set optim.zero1=true --set optim.exchange=bf16
            like "bf16-$w" plain bf16 "ZeRO-1, gradients in bf16" "$w"
        fi
        [ "$w" -gt 1 ] || continue
        resumed "$w" "zero1-$w"
        killed "$w"
    done
}

# ---- how fast? ----
bench() { # name ranks windows-a-GPU options...
    local name=$1 w=$2 batch=$3 line
    shift 3
    line=$(if [ "$w" = 0 ]; then
        "$bin/lsa-train" bench --case train --no-verify --ranks self --set train.batch="$batch" "$@"
    else
        mpirun --bind-to none -n "$w" "$bin/lsa-train" bench --case train --no-verify --ranks mpi --set train.batch="$batch" "$@"
    fi 2>"$work/log") || { cat "$work/log" >&2; fail "bench of $name on $w GPUs"; }
    grep '^{' <<<"$line" | sed "s/^{/{\"scaling\": \"speed\", \"case\": \"$name\", \"ranks\": $w, /" | tee -a "$lines" | cut -c1-240
}
speed() {
    local w b z=(--set optim.zero1=true) h=(--set optim.exchange=bf16)
    for b in 1024 256; do bench "weak $b" 0 $b; done
    for w in $sizes; do
        for b in 1024 256; do
            bench "weak $b, ZeRO-1, bf16" "$w" $b "${z[@]}" "${h[@]}"
            [ "$w" = 1 ] && [ $b = 1024 ] && continue
            bench "weak $b, ZeRO-1, f32" "$w" $b "${z[@]}"
            bench "weak $b, bf16" "$w" $b "${h[@]}"
            bench "weak $b, f32" "$w" $b
            [ "$w" = 1 ] || bench "weak $b, ZeRO-1, bf16, no overlap" "$w" $b "${z[@]}" "${h[@]}" --no-overlap
        done
        [ "$w" = 1 ] || bench "strong 1024, ZeRO-1, bf16" "$w" $((1024 / w)) "${z[@]}" "${h[@]}"
    done
}

[ "$only" = speed ] || check
[ "$only" = check ] || [ "$device" = cpu ] || speed
"$python" recipes/scaling_table.py "$lines" >"$out/scaling.md"
echo "$lines, $out/scaling.md"
