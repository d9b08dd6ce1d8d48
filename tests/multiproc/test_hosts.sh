#!/usr/bin/env bash
# Two network namespaces with a veth pair as two hosts of two ranks each: the run's bytes are those of one process; and when the link is cut
# both sides name a rank of the other and leave within the deadline, recipes/run-ranks.sh ends, and a resume on one host ends at the
# undisturbed run's bytes. Skipped (77) where namespaces cannot be made.
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/ranks.sh
a=lsa-$$-a b=lsa-$$-b
take_down() {
    local n p
    for n in $a $b; do
        for p in $(ip netns pids $n 2>/dev/null); do kill -KILL "$p" 2>/dev/null; done # nobody else is in there
        ip netns del $n 2>/dev/null
    done
    clean_up
}
trap take_down EXIT
{ command -v ip && ip netns add $a && ip netns add $b && ip link add v$$a netns $a type veth peer name v$$b netns $b; } >/dev/null 2>&1 ||
    { echo "skipped: no network namespaces here (needs root and iproute2)"; exit 77; }
ip -n $a addr add 10.213.77.1/24 dev v$$a && ip -n $b addr add 10.213.77.2/24 dev v$$b || bad "addresses"
for n in $a $b; do ip -n $n link set lo up; done
ip -n $a link set v$$a up && ip -n $b link set v$$b up || bad "links"

# Stands in for ssh: HOST command... runs in the other namespace, under another host name.
cat >"$work/agent" <<SH
#!/usr/bin/env bash
shift
exec ip netns exec $b unshare --uts bash -c 'hostname lsa-b; exec bash -c "\$*"' agent "\$@"
SH
chmod +x "$work/agent"
on_a() { ip netns exec $a unshare --uts bash -c 'hostname lsa-a; exec "$@"' on_a "$@"; }
hosts=(--mca plm rsh --mca plm_rsh_agent "$work/agent" --host 10.213.77.1:2,10.213.77.2:2 --mca btl tcp,self
       --mca btl_tcp_if_include 10.213.77.0/24 --mca oob_tcp_if_include 10.213.77.0/24 -n 4)

"$bin/lsa-dump" synth --out "$work/shards" --docs 12 --tokens 1024 --layers 2 --seed 3 >/dev/null || bad synth
deadline=4
run=("$bin/lsa-train" run --recipe recipes/smoke.yaml --data "$work/shards" --device cpu --set data.virtual_shards=4 --set train.batch=16
     --set train.steps=1500 --set train.eval_every=500 --set train.save_every=50 --set train.log_every=1 --deadline $deadline)
"${run[@]}" --out "$work/whole" >/dev/null 2>&1 || bad "one process"
same() { for f in model.safetensors optim.safetensors state.json; do cmp "$work/whole/ckpt/step_00001500/$f" "$work/run/ckpt/step_00001500/$f" || bad "$1: $f differs"; done; }

on_a timeout --kill-after=5 120 mpirun "${hosts[@]}" "${run[@]}" --out "$work/run" >"$work/log" 2>&1 || { bad "two hosts"; cat "$work/log"; }
same "two hosts"

rm -rf "$work/run"
on_a bash recipes/run-ranks.sh "${hosts[@]}" -- "${run[@]}" --out "$work/run" >"$work/log" 2>&1 &
job=$!
for i in $(seq 300); do
    grep -q '"step": 60,' "$work/run/metrics.jsonl" 2>/dev/null && break
    sleep 0.05
done
ip -n $a link set v$$a down || bad "cannot cut the link"
t0=$SECONDS
for i in $(seq 300); do
    [ -z "$(pgrep -f "^$bin/lsa-train .*$work")" ] && break
    sleep 0.1
done
echo "the link is cut: all ranks on both hosts are gone after $((SECONDS - t0)) s (deadline $deadline s)"
[ $((SECONDS - t0)) -le 15 ] || bad "ranks outlive the cut link"
ended "not 0" 30
says "rank [01]: rank [23] \(process [0-9]+ on lsa-b\) has been silent for $deadline s"
"$bin/lsa-train" resume "$work/run" --device cpu >"$work/log" 2>&1 || { bad "resume"; cat "$work/log"; }
same "after the cut link"
verdict
