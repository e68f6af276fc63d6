#!/usr/bin/env bash
# Checks and times the CUDA operators, the engine and a cluster on a GPU machine that has neither Rust nor a network.
#   compute/scripts/gpu_check.sh pack FOLDER [tests] [kernels] [trireme]
#       here: builds, strips and compresses what must travel. `tests` (9 MB) is every GPU test of all crates as one program,
#       `kernels` (0.2 MB) the kernels compiled, `trireme` (8 MB) the program itself. All, if none is named.
#   compute/scripts/gpu_check.sh run FOLDER [OUT]
#       there, in the repository's root; what came along decides what is done. Tests: operators, the engine's golden, quality and
#       invariance tests, experts on other workers, the invariance matrix over clusters; with SANITIZE=1 also the operators
#       under compute-sanitizer's memcheck and racecheck. The program: cold starts, a checkpoint from memory, what
#       failures look like, then the times of operators and of steps of V3's width. ONLY="engine serve" does those parts
#       alone. A line a part, logs in OUT. On an H200 machine with 16 cores: operators a minute and more, engine expert
#       cluster one together, sanitize two, serve 5 s, failures 45 s, weights 20 s, times 5 s, steps 30 s.
# The machine needs a driver for CUDA 13 and glibc 2.36 or later; NVRTC, unless kernels came along.
set -euo pipefail

# Parts of the tests beside the operators, each a program's run of its own: a fault ends a process' context, and nobody else's.
parts="engine_golden engine_tiny engine_fp8_quality engine_invariance engine_cuda engine_mtp expert_same_bits cluster_matrix"

pack() {
    local folder=$1 root part
    shift
    root=$(cd "$(dirname "$0")/../.." && pwd)
    mkdir -p "$folder"
    folder=$(cd "$folder" && pwd)
    cd "$root"
    # Of cargo's messages, one a line, the executable of the target of that kind and name.
    executable() { grep "\"kind\":\[\"$1\"\].*\"name\":\"$2\"" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'; }
    small() { xz --force --x86 --lzma2=preset=9e,dict=64MiB "$1"; }
    for part in ${*:-tests kernels trireme}; do
        case $part in
        tests)
            # Optimised as the operators' own tests are, which compute their reference on the CPU.
            strip -o "$folder/tests" \
                "$(cargo test --config 'profile.dev.package.trireme.opt-level=3' --quiet --locked -p trireme --test gpu \
                    --no-run --message-format=json | executable test gpu)"
            small "$folder/tests"
            ;;
        kernels)
            rm -rf "$folder/kernels"
            mkdir "$folder/kernels"
            .ci/kernels "$folder/kernels" >"$folder/kernels.log" || { tail "$folder/kernels.log" && return 1; }
            tar -C "$folder" -cf "$folder/kernels.tar" kernels
            small "$folder/kernels.tar"
            rm -r "$folder/kernels" "$folder/kernels.log"
            ;;
        trireme)
            strip -o "$folder/trireme" \
                "$(cargo build --quiet --locked --release -p trireme --message-format=json | executable bin trireme)"
            small "$folder/trireme"
            ;;
        *) echo "nothing called $part is packed" >&2 && return 2 ;;
        esac
    done
    ls -l "$folder"
}

# Whether a part was asked for and came along.
wants() {
    case " ${ONLY:-$1} " in *" $1 "*) [ -f "$2" ] ;; *) return 1 ;; esac
}

# One part of the tests.
tests() {
    local part=$1 status=0 from=$SECONDS
    "$work/tests" "${part}::" --include-ignored --nocapture --test-threads=1 >"$out/$part.log" 2>&1 || status=1
    echo "$part: $(grep -h '^test result' "$out/$part.log" || tail -n 1 "$out/$part.log"), $((SECONDS - from)) s in all"
    grep -hE 'panicked|^  (left|right)' -A 2 "$out/$part.log" | cut -c1-300 | head -n 6 || true
    return $status
}

# The operators' tests under one of compute-sanitizer's tools, at small shapes. Opening devices over and over, and running
# out of memory on purpose, are not what it looks for. What else is given chooses among the tests.
sanitize() {
    local tool=$1 which=${2:-} log status=0 from=$SECONDS
    log="$out/$tool${which:+_${which//[^a-z]/}}.log"
    shift
    TRIREME_TEST_SMALL=1 compute-sanitizer --tool "$tool" --error-exitcode 1 "$work/tests" "${@:-operators::}" \
        --include-ignored --test-threads=1 --skip operators::device >"$log" 2>&1 || status=1
    grep -q '^test result: ok. [1-9]' "$log" || status=1
    echo "$tool ${*:-}: $(grep -hE 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" | tail -n 1 | tr -d =)," \
        "$(grep -h '^test result' "$log"), $((SECONDS - from)) s in all"
    return $status
}

# Waits for all that runs.
all_of() {
    local status=0 one
    for one in "$@"; do wait "$one" || status=1; done
    return $status
}

run() {
    local folder=$1 out=${2:-$(mktemp -d)} work status=0 name part running=()
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
    # Not beside the programs, which would take them: here is a compiler, and what it makes is to be checked.
    mkdir "$work/prebuilt"
    [ ! -f "$work/kernels.tar" ] || tar -C "$work/prebuilt" -xf "$work/kernels.tar"
    local library
    library=$(find /usr/local/cuda*/ /usr/lib /opt -name 'libnvrtc.so.13' 2>/dev/null | head -n 1 || true)
    if [ -n "$library" ]; then
        export LD_LIBRARY_PATH="$(dirname "$library"):${LD_LIBRARY_PATH:-}"
    elif [ -d "$work/prebuilt/kernels" ]; then
        cp -r "$work/prebuilt/kernels" "$work/kernels"
    fi
    export XDG_CACHE_HOME=$work/cache TRIREME_ROOT=$PWD TRIREME_TEST_DEVICE=cuda:0
    echo "driver $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1); NVRTC ${library:-absent}"
    # Right or wrong does not hang on what runs beside it; only times do. The operators launch and wait some ten thousand times,
    # each a turn where the device has several processes: they go first.
    if wants operators "$work/tests"; then tests operators || status=1; fi
    for part in $parts; do
        if wants "${part%%_*}" "$work/tests"; then
            tests "$part" &
            running+=($!)
        fi
    done
    all_of "${running[@]}" || status=1
    if [ "${SANITIZE:-0}" = 1 ] && wants sanitize "$work/tests"; then
        sanitize memcheck & running=($!)
        # A cluster's barriers take it long.
        sanitize racecheck operators::sample & running+=($!)
        sanitize racecheck operators:: --skip operators::sample & running+=($!)
        all_of "${running[@]}" || status=1
    fi
    if wants serve "$work/trireme"; then
        python3 compute/scripts/gpu_serve.py "$work/trireme" 2>&1 | tee "$out/serve.log" || status=1
    fi
    if wants failures "$work/trireme"; then
        python3 compute/scripts/gpu_failures.py "$work/trireme" "$work/prebuilt/kernels" "$out" 2>&1 |
            tee "$out/failures.log" || status=1
    fi
    if wants weights "$work/trireme"; then
        python3 compute/scripts/gpu_weights.py bench/src/engine/v3.json /dev/shm/weights || status=1
        for _ in 1 2; do
            TRIREME_LOG=info "$work/trireme" bench engine --device cuda:0 --model /dev/shm/weights --threads 16 --batch 1 \
                --prompt 64 --gen 2 --prefill 1x64 --chunk 64 >"$out/weights.log" 2>&1 || status=1
            grep -hE 'weights are on|ready in|kernels loaded|rror' "$out/weights.log" | cut -c1-300 || true
        done
        rm -rf /dev/shm/weights
    fi
    if wants times "$work/trireme"; then
        "$work/trireme" bench ops --device cuda:0 | tee "$out/ops.log" || status=1
    fi
    if wants steps "$work/trireme"; then
        # Tokens routed evenly, then all of them to the same experts.
        for part in 0 100; do
            "$work/trireme" bench engine --device cuda:0 --synthetic 6 --batch 1,8,32,64,128 --prompt 4096 --gen 20 \
                --chunk 8192 --router-bias "$part" | tee "$out/steps_$part.log" || status=1
        done
    fi
    return $status
}

case "${1:-}" in
pack | run) "$@" ;;
*) sed -n '2,14p' "$0" && exit 2 ;;
esac
