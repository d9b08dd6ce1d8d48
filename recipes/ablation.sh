#!/usr/bin/env bash
# What each ingredient of an indexer is worth: trains variants of one recipe on the same shards with several seeds, exports them, and runs each
# through the two-level decoder on held-out documents, one process a document.
#   recipes/ablation.sh --bin DIR --data SHARDS --val TOKENS INDEX A:B --teacher DIR --recipe FILE.yaml --out DIR
#       [--seeds "1 2 3"] [--budgets 0.05,0.10] [--variants "name ..."] [--device cpu] [--decode-device cpu] [--jobs N]
# Lines go to DIR/results.jsonl (a variant, seed, document and budget each; policies without an indexer once), the table to DIR/RESULTS.md. What is
# there already is not run again. Options after -- go to every lsa-train.
set -euo pipefail
cd "$(dirname "$0")/.."
bin= data= tokens= index= docs= teacher= recipe= out= seeds="1 2 3" budgets=0.05,0.10 only= device=cpu decode= jobs=$(nproc)
while [ $# -gt 0 ]; do
    case $1 in
    --bin) bin=$2 ;;
    --data) data=$2 ;;
    --val) tokens=$2 index=$3 docs=$4; shift 2 ;;
    --teacher) teacher=$2 ;;
    --recipe) recipe=$2 ;;
    --out) out=$2 ;;
    --seeds) seeds=$2 ;;
    --budgets) budgets=$2 ;;
    --variants) only=" $2 " ;;
    --device) device=$2 ;;
    --decode-device) decode=$2 ;;
    --jobs) jobs=$2 ;;
    --) shift; break ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
    esac
    shift 2
done
more=("$@")
for v in bin data tokens index docs teacher recipe out; do [ -n "${!v}" ] || { echo "$0: --$v is missing" >&2; exit 2; }; done
python=${LSA_PYTHON:-python3}
mkdir -p "$out"
lines=$out/results.jsonl
touch "$lines"

# name: changes to the recipe, whose own settings are the variant "default". The published trainer's way is focal loss on votes of sampled candidates.
variants=(
    "default"
    "plain: model.continuation=0"
    "mass: loss.sharpen=1"
    "prior: model.prior=true train.precision=f32"
    "votes: model.continuation=0 loss.kind=focal loss.on=layer sample.candidates=sampled sample.order=shuffled"
    "by-mass: loss.by_mass=true"
    "small: model.heads=8 model.rank=64"
    "large: model.heads=64 model.rank=512"
)

decode_all() { # variant seed indexer policies
    local d list=()
    for ((d = ${docs%:*}; d < ${docs#*:}; d++)); do
        grep -q "\"variant\": \"$1\", \"seed\": $2, \"document\": $d," "$lines" || list+=("$d")
    done
    [ ${#list[@]} -gt 0 ] || return 0
    printf '%s\n' "${list[@]}" | OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive xargs -P "$jobs" -I{} bash -c '
        set -euo pipefail
        end=$(({} + 1))
        "$1/lsa-decode" validate --teacher "$2" --tokens "$3" --needs "$4" --documents {}:$end --budget "$5" --tau 64 --tail 256 --json --policy "$6" ${7:+--indexer "$7"} \
            ${10:+--device "${10}"} 2>"${11}/part.{}.log" | sed "s/^{/{\"variant\": \"$8\", \"seed\": $9, \"document\": {}, /" >"${11}/part.{}" || {
            tail -n 3 "${11}/part.{}.log" >&2
            echo "ablation: $8, seed $9, document {}: decoding failed" >&2
            exit 1
        }
        ' _ "$bin" "$teacher" "$tokens" "$index" "$budgets" "$4" "$3" "$1" "$2" "$decode" "$out"
    for d in "${list[@]}"; do cat "$out/part.$d" >>"$lines"; rm "$out/part.$d" "$out/part.$d.log"; done
}

decode_all - 0 "" full,oracle,recency,random,last,last-spread
for seed in $seeds; do
    for v in "${variants[@]}"; do
        name=${v%%:*}
        [ -z "$only" ] || [[ $only == *" $name "* ]] || continue
        run=$out/$name-$seed
        if [ ! -e "$run/indexer/indexer.safetensors" ]; then
            sets=()
            for s in $([[ $v != *:* ]] || echo "${v#*:}"); do sets+=(--set "$s"); done
            rm -rf "$run"
            "$bin/lsa-train" run --recipe "$recipe" --data "$data" --out "$run" --device "$device" --set train.seed="$seed" "${sets[@]}" "${more[@]}" >"$out/$name-$seed.log" 2>&1 ||
                { tail -n 3 "$out/$name-$seed.log" >&2; echo "$0: variant $name, seed $seed: training failed" >&2; exit 1; }
            "$bin/lsa-export" write "$run" --out "$run/indexer" >>"$out/$name-$seed.log" 2>&1 ||
                { tail -n 3 "$out/$name-$seed.log" >&2; echo "$0: variant $name, seed $seed: export failed" >&2; exit 1; }
        fi
        decode_all "$name" "$seed" "$run/indexer" lsa
        echo "$name, seed $seed: $(tail -n 1 "$run/metrics.jsonl" | cut -c1-160)" >&2
    done
done
"$python" recipes/ablation_table.py "$lines" | tee "$out/RESULTS.md"
