#!/usr/bin/env bash
# Checks and times the CUDA operators, the engine and a cluster on a GPU machine that has neither Rust nor a network.
#   compute/scripts/gpu_check.sh pack FOLDER        here: builds, strips and compresses what must travel (25 MB)
#   compute/scripts/gpu_check.sh run FOLDER [OUT]   there, in the repository's root: operator tests, the engine's golden,
#                                                   quality and invariance tests on the GPU, experts on other workers, the
#                                                   invariance matrix over clusters, cold starts, a checkpoint from memory,
#                                                   then times, in one table; with SANITIZE=1 also compute-sanitizer's
#                                                   memcheck and racecheck; ONLY="engine serve" runs those parts alone
# The machine needs a driver for CUDA 13 and glibc 2.36 or later; kernels come prebuilt in FOLDER, and are compiled once
# more there if it has NVRTC.
set -euo pipefail

# Test binaries that run on the device that TRIREME_TEST_DEVICE names: crate and test.
device_tests=("engine golden" "engine tiny" "engine fp8_quality" "engine invariance" "engine cuda" "engine mtp"
    "expert same_bits" "trireme matrix")

pack() {
    local folder=$1 root
    root=$(cd "$(dirname "$0")/../.." && pwd)
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd)
    cd "$root"
    # The artifact's path is the last field of cargo's message that names an executable.
    executable() { sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1; }
    local built=()
    built+=("tests $(cargo test --quiet --locked -p compute --test cuda --no-run --message-format=json | executable)")
    built+=("trireme $(cargo build --quiet --locked --release -p trireme --message-format=json | executable)")
    for pair in "${device_tests[@]}"; do
        set -- $pair
        built+=("$1_$2 $(cargo test --quiet --locked -p "$1" --test "$2" --no-run --message-format=json | executable)")
    done
    for pair in "${built[@]}"; do
        set -- $pair
        strip -o "$folder/$1" "$2"
        xz -9 --force "$folder/$1"
    done
    ls -l "$folder"
}

# Whether a part was asked for and came along.
wants() {
    case " ${ONLY:-$1} " in *" $1 "*) [ -z "${2:-}" ] || [ -f "$2" ] ;; *) return 1 ;; esac
}

run() {
    local folder=$1 out=${2:-$(mktemp -d)} work status=0 name
    work=$(mktemp -d)
    for name in "$folder"/*.xz; do
        name=$(basename "$name" .xz)
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
    export XDG_CACHE_HOME=$work/cache TRIREME_ROOT=$PWD TRIREME_TEST_DEVICE=cuda:0
    echo "driver $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1); NVRTC ${library:-absent}"
    if wants operators "$work/tests"; then
        "$work/tests" --nocapture --test-threads=1 >"$out/tests.log" 2>&1 || status=1
        grep -hE '^test |panicked|^error' "$out/tests.log" | cut -c1-200 || true
        if grep -q '^skipped' "$out/tests.log"; then
            echo "some tests found no device or no compiler: nothing was shown"
            status=1
        fi
        grep '^test result' "$out/tests.log" || true
        [ "${SANITIZE:-0}" != 1 ] || sanitize || status=1
    fi
    for name in "${device_tests[@]/ /_}"; do
        wants "${name%%_*}" "$work/$name" || continue
        "$work/$name" --test-threads=1 >"$out/$name.log" 2>&1 || status=1
        echo "$name: $(grep -h '^test result' "$out/$name.log" || tail -n 1 "$out/$name.log")"
        grep -hE 'panicked|^  (left|right)' -A 2 "$out/$name.log" | cut -c1-400 | head -n 12 || true
    done
    if wants serve "$work/trireme"; then
        python3 compute/scripts/gpu_serve.py "$work/trireme" 2>&1 | tee "$out/serve.log" || status=1
    fi
    if wants weights "$work/trireme"; then
        python3 compute/scripts/gpu_weights.py bench/src/engine/v3.json /dev/shm/weights || status=1
        for _ in 1 2; do
            RUST_LOG=info "$work/trireme" bench engine --device cuda:0 --model /dev/shm/weights --threads 16 --batch 1 \
                --prompt 64 --gen 2 --prefill 1x64 --chunk 64 >"$out/weights.log" 2>&1 || status=1
            grep -hE 'weights are on|ready in|kernels loaded|rror' "$out/weights.log" | cut -c1-300 || true
        done
        rm -rf /dev/shm/weights
    fi
    if wants times "$work/trireme"; then
        "$work/trireme" bench ops --device cuda:0 | tee "$out/ops.log" || status=1
    fi
    return $status
}

sanitize() {
    local tool status=0
    for tool in memcheck racecheck; do
        # Opening devices over and over, and running out of memory on purpose, are not what it looks for.
        TRIREME_TEST_SMALL=1 compute-sanitizer --tool "$tool" --error-exitcode 1 "$work/tests" --test-threads=1 \
            --skip device:: >"$out/$tool.log" 2>&1 || status=1
        echo "$tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/$tool.log" | tail -n 1)"
    done
    return $status
}

case "${1:-}" in
pack | run) "$@" ;;
*) sed -n '2,9p' "$0" && exit 2 ;;
esac
