#!/usr/bin/env bash
# Checks and times the CUDA operators and the engine on a GPU machine that has neither Rust nor a network.
#   compute/scripts/gpu_check.sh pack FOLDER        here: builds, strips and compresses what must travel (20 MB)
#   compute/scripts/gpu_check.sh run FOLDER [OUT]   there, in the repository's root: operator tests, the engine's golden,
#                                                   quality and invariance tests on the GPU, then times, in one table;
#                                                   with SANITIZE=1 also compute-sanitizer's memcheck and racecheck
# The machine needs a driver for CUDA 13 and glibc 2.36 or later; kernels come prebuilt in FOLDER, and are compiled once
# more there if it has NVRTC.
set -euo pipefail

engine_tests=(golden tiny fp8_quality invariance cuda mtp)

pack() {
    local folder=$1 root
    root=$(cd "$(dirname "$0")/../.." && pwd)
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd)
    cd "$root"
    # The artifact's path is the last field of cargo's message that names an executable.
    executable() { sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1; }
    local tests trireme
    tests=$(cargo test --quiet --locked -p compute --test cuda --no-run --message-format=json | executable)
    trireme=$(cargo build --quiet --locked --release -p trireme --message-format=json | executable)
    local engine=()
    for name in "${engine_tests[@]}"; do
        engine+=("engine_$name $(cargo test --quiet --locked -p engine --test "$name" --no-run --message-format=json | executable)")
    done
    for pair in "tests $tests" "trireme $trireme" "${engine[@]}"; do
        set -- $pair
        strip -o "$folder/$1" "$2"
        xz -9 --force "$folder/$1"
    done
    ls -l "$folder"
}

run() {
    local folder=$1 out=${2:-$(mktemp -d)} work status=0
    work=$(mktemp -d)
    for name in tests trireme "${engine_tests[@]/#/engine_}"; do
        python3 - "$folder/$name.xz" "$work/$name" <<'PYTHON'
import lzma, shutil, sys
with lzma.open(sys.argv[1]) as packed, open(sys.argv[2], "wb") as unpacked:
    shutil.copyfileobj(packed, unpacked)
PYTHON
        chmod +x "$work/$name"
    done
    local library
    library=$(find /usr/local/cuda*/ /usr/lib /opt -name 'libnvrtc.so.13' 2>/dev/null | head -n 1 || true)
    if [ -n "$library" ]; then export LD_LIBRARY_PATH="$(dirname "$library"):${LD_LIBRARY_PATH:-}"; fi
    export XDG_CACHE_HOME=$work/cache
    echo "driver $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1); NVRTC ${library:-absent}"
    "$work/tests" --nocapture --test-threads=1 >"$out/tests.log" 2>&1 || status=1
    for name in "${engine_tests[@]}"; do
        TRIREME_ROOT=$PWD TRIREME_TEST_DEVICE=cuda:0 \
            "$work/engine_$name" --test-threads=1 >"$out/engine_$name.log" 2>&1 || status=1
        echo "engine $name: $(grep -h '^test result' "$out/engine_$name.log" || tail -n 1 "$out/engine_$name.log")"
    done
    if [ "${SANITIZE:-0}" = 1 ]; then
        for tool in memcheck racecheck; do
            # Opening devices over and over, and running out of memory on purpose, are not what it looks for.
            TRIREME_TEST_SMALL=1 compute-sanitizer --tool "$tool" --error-exitcode 1 "$work/tests" --test-threads=1 --skip device:: \
                >"$out/$tool.log" 2>&1 || status=1
        done
    fi
    grep -hE '^test |panicked|^error' "$out/tests.log" | cut -c1-200 || true
    for tool in memcheck racecheck; do
        [ ! -f "$out/$tool.log" ] || echo "$tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/$tool.log" | tail -n 1)"
    done
    if grep -q '^skipped' "$out/tests.log"; then
        echo "some tests found no device or no compiler: nothing was shown"
        status=1
    fi
    "$work/trireme" bench ops --device cuda:0 | tee "$out/ops.log" || status=1
    grep '^test result' "$out/tests.log" || true
    return $status
}

case "${1:-}" in
pack | run) "$@" ;;
*) sed -n '2,6p' "$0" && exit 2 ;;
esac
