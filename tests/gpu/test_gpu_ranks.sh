#!/usr/bin/env bash
# Training on several GPUs over NCCL. With one GPU: a communicator of one rank walks the same code and must train as the plain step does,
# with whole and sharded moments, gradients in f32 and bf16. With two or more: what recipes/scaling.sh checks, and sampled candidates. Skipped (77) without a GPU or without MPI.
set -euo pipefail
. "$(dirname "$0")/../testkit/gpu.sh"
"$bin/lsa-train" --version | grep -q 'MPI *OFF' && skip "built without MPI, which brings the ranks together"
command -v mpirun >/dev/null || skip "no mpirun"
work=$(mktemp -d /tmp/lsa-gpu-ranks-XXXXXX)
trap 'rm -rf "$work"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 NCCL_NVLS_ENABLE=0
gpus=$(nvidia-smi -L | wc -l)

"$bin/lsa-dump" synth --out "$work/shards" --docs 40 --tokens 4096 --layers 3 --hidden 256 --seed 5 >/dev/null 2>&1
train() { # ranks name steps options...: ranks 0 is the plain step, without NCCL
    local n=$1 name=$2 steps=$3 how=()
    shift 3
    [ "$n" = 0 ] || how=(mpirun --bind-to none -n "$n")
    "${how[@]}" "$bin/lsa-train" run --data "$work/shards" --out "$work/$name" --device cuda --ranks "$([ "$n" = 0 ] && echo self || echo mpi)" \
        --set model.heads=32 --set model.rank=256 --set train.steps="$steps" --set train.batch=64 --set sample.val_documents=8 \
        --set train.log_every=1 --set train.eval_every="$steps" --set optim.warmup=10 "$@" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
}
like() { # name other relative [last]: the losses of all steps, or the mean of the last so many, and the last evaluation
    "$python" - "$work/$1/metrics.jsonl" "$work/$2/metrics.jsonl" "$3" "${4:-0}" <<'PY'
import json, sys
read = lambda p: [json.loads(l) for l in open(p)]
a, b, tol, last = read(sys.argv[1]), read(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
loss = [[x["loss"] for x in y if "loss" in x] for y in (a, b)]
worst = max(abs(x - y) / abs(y) for x, y in zip(*loss))
if last:
    loss = [[sum(x[-last:]) / last] for x in loss]
held = [[x["eval"]["sum"]["captured"] for x in y if "eval" in x][-1:] for y in (a, b)]
off = max(abs(x - y) / abs(y) for x, y in zip(loss[0] + held[0], loss[1] + held[1]))
names = " against ".join(p.split("/")[-2] for p in sys.argv[1:3])
print(f"{names}: largest relative difference {off:.2e} of {f'the mean of the last {last} losses' if last else f'{len(loss[0])} losses'} and the evaluation, allowed {tol:g}; of single steps {worst:.2e}")
sys.exit(not (len(a) == len(b) and off <= tol and held[0] and (last or len(loss[0]) >= 10)))
PY
}
same() { cmp "$work/$1/ckpt/step_$2/optim.safetensors" "$work/$3/ckpt/step_$2/optim.safetensors" && echo "$1 and $3: bit-equal"; }

train 0 plain 20
train 1 one 20
like one plain 1e-5
train 1 one-zero1 20 --set optim.zero1=true
same one 00000020 one-zero1
train 0 plain-long 200
train 1 one-bf16 200 --set optim.exchange=bf16 --set optim.zero1=true
like one-bf16 plain-long 2e-3 50
train 0 plain-micro 20 --set train.micro_batch=16
train 1 one-micro 20 --set train.micro_batch=16
like one-micro plain-micro 1e-5
for how in "--ranks self" "--ranks mpi" "--ranks mpi --set optim.zero1=true" "--ranks mpi --set optim.exchange=bf16 --set optim.zero1=true"; do
    mpirun --bind-to none -n 1 "$bin/lsa-train" bench --case train --no-verify --set train.batch=256 $how 2>/dev/null | grep '"bench": "train"'
done

if command -v compute-sanitizer >/dev/null; then # a communicator of one, so NCCL's own kernels do nothing. NCCL asks the driver
    # for kernels that this GPU may not have and takes no for an answer: that is an API error, not one of memory.
    mpirun --bind-to none -n 1 compute-sanitizer --tool memcheck --report-api-errors no "$bin/lsa-train" bench --case train --ranks mpi --layers 2 --heads 32 --rank 64 --hidden 128 \
        --candidates 200 --chunks 300 --steps 2 --no-verify --set train.batch=8 --set optim.zero1=true --set optim.exchange=bf16 >"$work/log" 2>&1 ||
        { cat "$work/log"; exit 1; }
    grep -q 'ERROR SUMMARY: 0 errors' "$work/log" || { cat "$work/log"; exit 1; }
    echo "memcheck: clean"
fi

if [ "$gpus" -lt 2 ]; then
    echo "one GPU: two ranks were not run"
    exit 0
fi
bash recipes/scaling.sh --bin "$bin" --out "$work/scaling" --ranks 2 --only check
train 2 two-sampled 200 --set loss.kind=focal --set loss.on=layer --set sample.candidates=sampled --set sample.order=shuffled --set train.pool_mib=8
train 0 plain-sampled 200 --set loss.kind=focal --set loss.on=layer --set sample.candidates=sampled --set sample.order=shuffled --set train.pool_mib=8
like two-sampled plain-sampled 2e-3 50
