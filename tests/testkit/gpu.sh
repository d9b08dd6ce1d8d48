# Sourced by tests/gpu/*.sh: goes to the repository root, names the programs ($bin, $python), and ends the test as skipped (77) where no GPU or no
# CUDA build is; LSA_REQUIRE=gpu turns that into a failure.
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
bin=${LSA_BIN:?}
python=${LSA_PYTHON:-python3}
skip() { echo "skipped: $*"; [[ ${LSA_REQUIRE:-} == *gpu* ]] && exit 1; exit 77; }
command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || skip "no GPU"
"$bin/lsa-train" --version | grep -q 'CUDA *OFF' && skip "built without CUDA"
true
