#!/usr/bin/env bash
# What others link: the installed library exports the functions of its header and nothing else, needs few libraries,
# and is found by pkg-config and by CMake from a prefix that did not exist when it was configured.
set -uo pipefail
cd "$(dirname "$0")/../.."
. tests/testkit/expect.sh
quiet() { "$@" >"$work/out" 2>&1 || { bad "exit $?: $*"; cat "$work/out"; }; }
build=${LSA_BUILD:?}
grep -q '^LSA_SANITIZE:STRING=.' "$build/CMakeCache.txt" && { echo "skipped: a sanitized library needs a sanitized program"; exit 77; }
quiet cmake --install "$build" --prefix "$work/prefix"
so=$(find "$work/prefix" -name liblsa_indexer.so)
lib=$(dirname "$so")
expect 0 "lsa " "$work/prefix/bin/lsa-export" --version

# exactly the functions of the header; a soname that follows LSA_IDX_ABI
grep -oE '^LSA_IDX_API [a-z]+ (lsa_idx_[a-z_]+)' "$work/prefix/include/lsa/lsa_indexer.h" | sed 's/.* //' | sort >"$work/declared"
nm -D --defined-only "$so" | sed 's/.* //' | sort >"$work/exported"
[ "$(wc -l <"$work/declared")" = 10 ] || bad "the header declares $(wc -l <"$work/declared") functions"
diff "$work/declared" "$work/exported" || bad "exported and declared functions differ"
abi=$(sed -n 's/^#define LSA_IDX_ABI *\([0-9]*\).*/\1/p' export/abi/lsa_indexer.h)
expect 0 "liblsa_indexer.so.$abi" objdump -p "$so"
for n in $(objdump -p "$so" | sed -n 's/ *NEEDED *//p'); do
    case $n in
    libc.so.* | libm.so.* | libjansson.so.* | libz.so.* | libopenblas.so.* | libblas.so.* | libgomp.so.* | libomp.so.* | ld-linux*) ;;
    libcudart.so.* | libcublasLt.so.*) grep -q '^LSA_CUDA:.*=OFF' "$build/CMakeCache.txt" && bad "needs $n" ;;
    *) bad "the library needs $n" ;;
    esac
done
[ "$(find "$work/prefix/include" -name '*.h' | wc -l)" = 1 ] || bad "headers beside lsa_indexer.h are installed"

# the prefix is moved: nothing may hold its path
mv "$work/prefix" "$work/moved"
lib=${lib/prefix/moved}
pc=(env PKG_CONFIG_PATH="$lib/pkgconfig" pkg-config)
quiet "$bin/lsa-export" import recipes/mini/teacher --out "$work/native"
quiet "$bin/lsa-export" write "$work/native" --out "$work/indexer"
quiet "${pc[@]}" --modversion lsa_indexer
read -ra flags <<<"$("${pc[@]}" --cflags --libs lsa_indexer)"
for std in "cc -x c -std=c99" "c++ -x c++ -std=c++11"; do
    rm -f "$work/consumer"
    # shellcheck disable=SC2086
    quiet $std -Wall -Wextra -Wpedantic -Werror tests/e2e/abi_consumer.c -x none "${flags[@]}" -Wl,-rpath,"$lib" -o "$work/consumer"
    expect 0 "3 joint layers" "$work/consumer" "$work/indexer"
    expect 1 "error: " "$work/consumer" "$work/nowhere"
done

# the example of the README
sed -n '/^```c$/,/^```$/p' export/abi/README.md | grep -v '^```' >"$work/example.c"
[ "$(wc -l <"$work/example.c")" -gt 15 ] || bad "no example in export/abi/README.md"
quiet cc -std=c99 -Wall -Wextra -Wpedantic -Werror -c "${flags[@]}" "$work/example.c" -o "$work/example.o"

mkdir "$work/project"
cp tests/e2e/abi_consumer.c "$work/project/"
cat >"$work/project/CMakeLists.txt" <<'CM'
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES C)
find_package(lsa_indexer 0.1 REQUIRED)
add_executable(consumer abi_consumer.c)
target_link_libraries(consumer PRIVATE lsa::lsa_indexer)
CM
quiet cmake -S "$work/project" -B "$work/project/build" -DCMAKE_PREFIX_PATH="$work/moved"
quiet cmake --build "$work/project/build"
expect 0 "3 joint layers" "$work/project/build/consumer" "$work/indexer"
sed -i 's/lsa_indexer 0.1/lsa_indexer 9/' "$work/project/CMakeLists.txt"
expect 1 "requested version" cmake -S "$work/project" -B "$work/project/build2" -DCMAKE_PREFIX_PATH="$work/moved"
verdict
