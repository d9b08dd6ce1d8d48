#!/usr/bin/env bash
# recipes/scaling.sh with CPU ranks: what it checks holds, a run that differs is found, wrong calls are refused.
set -euo pipefail
cd "$(dirname "$0")/../.."
bin=${LSA_BIN:?}
"$bin/lsa-train" --version | grep -q 'MPI *OFF' && { echo "skipped: built without MPI"; exit 77; }
command -v mpirun >/dev/null || { echo "skipped: no mpirun"; exit 77; }
work=$(mktemp -d /tmp/lsa-scaling-XXXXXX)
trap 'rm -rf "$work"' EXIT
export LSA_PYTHON=${LSA_PYTHON:-python3}
bash recipes/scaling.sh --bin "$bin" --out "$work/a" --ranks "1 2" --device cpu
[ "$(grep -c '"ok": true' "$work/a/scaling.jsonl")" = 6 ]
grep -q '| a rank killed | 2 |' "$work/a/scaling.md"
[ -z "$(ls -d "$work"/a/work-* 2>/dev/null)" ]

# a program whose two ranks train with another rate
mkdir "$work/wrong"
ln -s "$(realpath "$bin/lsa-dump")" "$work/wrong/lsa-dump"
cat >"$work/wrong/lsa-train" <<EOF
#!/bin/sh
case "\$* \$OMPI_COMM_WORLD_SIZE" in *' 2') exec "$(realpath "$bin/lsa-train")" "\$@" --set optim.lr=2e-3 ;; esac
exec "$(realpath "$bin/lsa-train")" "\$@"
EOF
chmod +x "$work/wrong/lsa-train"
rc=0
bash recipes/scaling.sh --bin "$work/wrong" --out "$work/b" --ranks 2 --device cpu >"$work/log" 2>&1 || rc=$?
[ $rc = 1 ] && grep -q 'gradients in f32 on 2: not equal' "$work/log" || { cat "$work/log"; exit 1; }

rc=0
bash recipes/scaling.sh --bin "$work/none" >"$work/log" 2>&1 || rc=$?
[ $rc = 2 ] && grep -q "no lsa-train in" "$work/log"
echo ok
