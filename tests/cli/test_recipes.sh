#!/usr/bin/env bash
# Every recipe resolves and says why it differs from the defaults; the V4-Flash ones train (made small) on shards with 21 CSA layers; the launch
# scripts parse, print what they would start, and refuse what cannot work.
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/expect.sh
export OMP_NUM_THREADS=1

n=0
for r in recipes/*.yaml; do
    expect 0 "train:" "$bin/lsa-train" config --recipe "$r"
    [ "$(head -c 1 "$r")" = "#" ] || bad "$r does not begin with what it is for"
    n=$((n + 1))
done
[ $n -ge 6 ] || bad "only $n recipes were found"
for r in recipes/v4-flash-joint*.yaml; do # section headings have no value; every value has its reason
    if grep -nE '^  [a-z_0-9]+: [^#]*$' "$r"; then bad "$r: keys without a reason"; fi
done
"$bin/lsa-dump" synth --out "$work/shards" --docs 6 --tokens 1024 --layers 21 --seed 5 >/dev/null || bad "synth"
for n in 3 8; do
    expect 0 "in $n joint layers" "$bin/lsa-train" run --recipe recipes/v4-flash-joint$n.yaml --data "$work/shards" --out "$work/run$n" --device cpu \
        --set model.heads=8 --set model.rank=16 --set window.tail=256 --set sample.val_documents=2 --set train.steps=2 --set train.batch=8
done

for f in recipes/*.sh recipes/*.sbatch; do
    bash -n "$f" || bad "$f does not parse"
    if command -v shellcheck >/dev/null; then shellcheck --severity=error "$f" || bad "$f: shellcheck"; fi
done
ranks=(bash recipes/run-ranks.sh)
expect 0 "mpirun -n 4 lsa-train run --out r" "${ranks[@]}" --launcher "echo mpirun" -n 4 -- lsa-train run --out r
expect 0 "srun --mpi=pmix -n 4 lsa-train resume r" "${ranks[@]}" --max-restarts 2 --launcher "echo srun --mpi=pmix" -n 4 -- lsa-train resume r
expect 2 "usage" "${ranks[@]}" --launcher echo -n 4 lsa-train run
expect 2 "'many' is not a number" "${ranks[@]}" --max-restarts many --launcher echo -- lsa-train run --out r
expect 2 "'no-such-launcher' is not on this machine" "${ranks[@]}" --launcher no-such-launcher -- lsa-train run --out r
sbatch=(env -u SLURM_JOB_ID bash recipes/slurm.sbatch)
expect 2 "usage" "${sbatch[@]}"
expect 2 "usage" "${sbatch[@]}" --recipe recipes/smoke.yaml
expect 2 "not in a Slurm job" "${sbatch[@]}" run --recipe recipes/smoke.yaml
verdict
