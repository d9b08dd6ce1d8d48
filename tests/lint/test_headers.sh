#!/usr/bin/env bash
# Public headers (lsa_*.h) stand alone and compile as C99 and as C++11.
set -euo pipefail
cd "$(dirname "$0")/../.."
headers=$(git ls-files --cached --others --exclude-standard '*/lsa_*.h')
[ -n "$headers" ] || { echo "no public headers found"; exit 1; }
check() { # language standard compiler: stdin is the source
    "$3" -x "$1" -std="$2" -Wall -Wextra -Wpedantic -Werror -I. -fsyntax-only -
}
if echo 'int f( {' | check c c99 cc 2>/dev/null; then echo "self-test: bad C was not seen"; exit 1; fi
for h in $headers; do
    echo "#include \"$h\"" | check c c99 cc || { echo "$h is not C99"; exit 1; }
    echo "#include \"$h\"" | check c++ c++11 c++ || { echo "$h is not C++11"; exit 1; }
done
echo "$(echo "$headers" | wc -w) public headers"
