#!/usr/bin/env bash
# Builds the packer with AddressSanitizer and UndefinedBehaviorSanitizer and feeds it malformed inputs.
# Usage: tools/sanitize_packer.sh [INPUTS]   (default 100000; PYTHON names the interpreter)
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

inputs=${1:-100000}
python=${PYTHON:-.venv/bin/python}
compiler=${CXX:-g++}
build=build/sanitize
library=$build/_C.so
flags=(-std=c++17 -O1 -g -fPIC -pthread -fno-omit-frame-pointer)
flags+=("-fsanitize=address,undefined" -fno-sanitize-recover=all)
includes=()
while read -r path; do includes+=("-I$path"); done < <("$python" -c '
import pybind11, sysconfig
print(pybind11.get_include(), sysconfig.get_path("include"), sep="\n")')

mkdir -p "$build"
if [[ ! -e $library || -n $(find csrc -maxdepth 1 -newer "$library") ]]; then
    objects=()
    for source in csrc/*.cpp; do
        object=$build/$(basename "$source" .cpp).o
        "$compiler" "${flags[@]}" "${includes[@]}" -c "$source" -o "$object"
        objects+=("$object")
    done
    "$compiler" "${flags[@]}" -shared "${objects[@]}" -o "$library"
fi

# The interpreter is not built with the sanitizers, so their runtime is preloaded; its own leaks are ignored.
preload="$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libstdc++.so)"
LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
    "$python" tests/packing/fuzz_packer.py --inputs "$inputs" --extension "$library"
