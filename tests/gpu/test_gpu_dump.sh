#!/usr/bin/env bash
# lsa-dump on a GPU: weights streamed layer by layer, in waves of any size, give the shards that resident weights give, byte for byte; a recheck on
# the GPU finds them equal; the document of 550K tokens goes through. Skipped (77) without a GPU.
set -euo pipefail
. "$(dirname "$0")/../testkit/gpu.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
run() { "$bin/lsa-dump" run --teacher recipes/mini/teacher --tokens recipes/mini/val.u16 --device cuda --documents 0:6 --dense-every 512 --shard-bytes 4M "$@"; }
run --out "$work/resident"
"$bin/lsa-dump" verify "$work/resident" --recheck 2 --device cuda
for wave in 1 20000 100000000; do
    run --out "$work/$wave" --stream --wave-tokens "$wave"
    for shard in "$work"/resident/shard_*.h5; do cmp "$shard" "$work/$wave/$(basename "$shard")"; done
done
# the same through a file, and rounded to bf16 between layers: other numbers, the same ones in waves of any size
run --out "$work/disk" --stream --wave-tokens 20000 --streams-dir "$work"
for shard in "$work"/resident/shard_*.h5; do cmp "$shard" "$work/disk/$(basename "$shard")"; done
for wave in 1 20000; do run --out "$work/half$wave" --stream --wave-tokens "$wave" --streams bf16; done
for shard in "$work"/half1/shard_*.h5; do cmp "$shard" "$work/half20000/$(basename "$shard")"; done
! cmp -s "$work/resident/shard_00000.h5" "$work/half1/shard_00000.h5" || { echo "bf16 streams changed nothing"; exit 1; }
# a long document: its tokens are those of the text, repeated
"$python" - recipes/mini/val.u16 "$work/long.u16" <<'PY'
import array, sys
ids = array.array("H", (open(sys.argv[1], "rb").read() * 40)[:1101678])
open(sys.argv[2], "wb").write(array.array("H", [0] + [i or 2 for i in ids[1:]]).tobytes())
PY
"$bin/lsa-dump" run --teacher recipes/mini/teacher --tokens "$work/long.u16" --device cuda --out "$work/long"
"$bin/lsa-dump" verify "$work/long"
echo ok
