#!/usr/bin/env bash
# recipes/slurm.sbatch with stand-ins for srun (starts the ranks with mpirun) and scontrol (notes what it was asked): a job whose ranks are
# told to stop is queued again with everything saved, a preempted one too; the next start resumes; it ends at the bytes of an
# undisturbed run; a wrong recipe is not queued again.
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/ranks.sh
"$bin/lsa-dump" synth --out "$work/shards" --docs 12 --tokens 1024 --layers 2 --seed 3 >/dev/null || bad synth
opts=(--recipe recipes/smoke.yaml --data "$work/shards" --device cpu --deadline 4 --set data.virtual_shards=4 --set train.batch=16
      --set train.steps=400 --set train.eval_every=100 --set train.save_every=50 --set train.log_every=1)
launch 2 "$bin/lsa-train" run "${opts[@]}" --out "$work/whole" >/dev/null 2>&1 || bad "undisturbed run"

mkdir "$work/stand-in"
cat >"$work/stand-in/srun" <<SH
#!/usr/bin/env bash
echo "srun \$*" >>"$work/asked"
while [ "\${1#--}" != "\$1" ]; do shift; done
exec ${mpi[@]} -n "\$(cat "$work/tasks")" "\$@"
SH
printf '#!/usr/bin/env bash\necho "scontrol $*" >>"%s/asked"\n' "$work" >"$work/stand-in/scontrol"
chmod +x "$work/stand-in/"*
batch() { # tasks: as Slurm starts a job
    echo "$1" >"$work/tasks"
    : >"$work/asked"
    SLURM_JOB_ID=77 SLURM_CPUS_PER_TASK=1 SLURM_SUBMIT_DIR=$PWD LSA_TRAIN="$bin/lsa-train" PATH="$work/stand-in:$PATH" \
        bash recipes/slurm.sbatch "$work/run" "${opts[@]}" >"$work/log" 2>&1 &
    job=$!
}
until_step() { # N: the run has reported it
    local i
    for i in $(seq 600); do
        grep -q "\"step\": $1," "$work/run/metrics.jsonl" 2>/dev/null && return
        sleep 0.05
    done
    bad "the run did not reach step $1"
    cat "$work/log"
}
asked() { grep -qE -- "$1" "$work/asked" || { bad "'$1' was not asked"; cat "$work/asked"; }; }

batch 4
until_step 60
kill -USR1 "$(pgrep -f "^${mpi[0]} .*$work/run")" # Slurm, before the end of the time: to the steps, not to this shell
ended 5 30
says "stopped at step [0-9]+ of 400, saved"
says "queued again"
asked "^srun --mpi=pmix --kill-on-bad-exit=0 --cpus-per-task=1 .*lsa-train run"
asked "^scontrol requeue 77"

batch 2 # fewer nodes this time
until_step 200
kill -TERM $(rank_pid 0) $(rank_pid 1) "$job" # preemption: to the ranks and to this shell
ended 5 30
asked "lsa-train resume $work/run --device cpu --deadline 4"
asked "^scontrol requeue 77"

batch 4
ended 0 60
if grep -q scontrol "$work/asked"; then bad "a finished job was queued again"; fi
for f in model.safetensors optim.safetensors; do
    cmp "$work/whole/ckpt/step_00000400/$f" "$work/run/ckpt/step_00000400/$f" || bad "after two interruptions $f differs"
done

rm -rf "$work/run"
opts+=(--set train.batch=17)
batch 2
ended 2 30
if grep -q scontrol "$work/asked"; then bad "a wrong recipe was queued again"; fi
verdict
