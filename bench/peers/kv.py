#!/usr/bin/env python3
"""KV blocks from one process' pool into another's: ours beside a copy, TCP, quinn, NIXL and Mooncake, in alternating rounds.

    python bench/peers/kv.py --trireme target/release/trireme --nixl-python VENV/bin/python \
        --mooncake-python VENV/bin/python --block 9216 --rounds 3 --out results.jsonl
    python bench/peers/kv.py --table results.jsonl

Each round runs every path once; a run is appended to --out as it ends, so that rounds may be run in several calls on a
machine that is quiet only for a while. A run during which other processes used more than --others cores is
repeated, twice at most, and the last one kept; the table says how many such there are. The table has the median of the runs in
the file with the slowest and the fastest. The peers: `pip install --no-deps nixl-cu12==1.5.1`;
`pip install mooncake-transfer-engine-non-cuda==0.3.13.post1` with Debian's libibverbs1 and libnuma1; numpy for both.
"""
import argparse
import glob
import json
import os
import resource
import statistics
import subprocess
import time

HERE = os.path.dirname(os.path.abspath(__file__))
CMA = "tcp,cma,self"


def nixl_library(python):
    """The C library of the wheel beside an interpreter."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(python)))
    found = glob.glob(f"{root}/lib/python3*/site-packages/.nixl_cu12.mesonpy.libs/libnixl_capi.so")
    return found[0] if found else None


def paths(args):
    """Name, command and environment of each path."""
    shape = ["--block", str(args.block), "--total-mib", str(args.total_mib), "--warm-mib", "64", "--inflight", "8"]
    shape += ["--pin-send", "0", "--pin-recv", "1"]
    quiet = {"NIXL_LOG_LEVEL": "FATAL", "UCX_NET_DEVICES": "lo"}
    ours = [args.trireme, "bench", "transfer", *shape, "--mode"]
    yield "memcpy", [*ours, "memcpy"], {}
    yield "memcpy and checksum", [*ours, "memcpy-sum"], {}
    yield "shared memory", [*ours, "shm"], {}
    yield "shared memory, bare", [*ours, "shm-bare"], {}
    yield "tokio TCP", [*ours, "tcp"], {}
    for mtu in ("65507", "8972"):
        yield f"QUIC {mtu}", [*ours, "quic", "--mtu", mtu], {}
        yield f"quinn alone {mtu}", [*ours, "quinn", "--mtu", mtu], {}
    library = nixl_library(args.nixl_python) if args.nixl_python else None
    for name, tls in (("TCP", "tcp"), ("CMA", CMA)):
        environment = {**quiet, "UCX_TLS": tls, "TRIREME_NIXL_LIBRARY": library or ""}
        if library:
            yield f"RDMA path, {name}", [*ours, "rdma"], environment
            yield f"NIXL alone, {name}", [args.nixl_python, f"{HERE}/kv_nixl.py", *shape], environment
    if args.nixl_harness:
        for name, tls in (("TCP", "tcp"), ("CMA", "cma")):
            command = [args.nixl_harness, "run", "--mode", "nixl", "--tls", tls, *shape]
            yield f"NIXL alone from Rust, {name}", command, {**quiet, "KVBENCH_NIXL": library or ""}
    if args.mooncake_python:
        less = ["--block", str(args.block), "--total-mib", "128", "--warm-mib", "32", "--inflight", "8"]
        yield "Mooncake, TCP", [args.mooncake_python, f"{HERE}/kv_mooncake.py", *less], {}


def busy():
    """Processor seconds that the machine has used."""
    fields = list(map(int, open("/proc/stat").readline().split()[1:9]))
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def used():
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def run(command, environment):
    busy_before, used_before, start = busy(), used(), time.monotonic()
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)
    others = (busy() - busy_before - (used() - used_before)) / (time.monotonic() - start)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    # The status says nothing of NIXL: its libraries' destructors may fail when all is done.
    if not lines or "bad=0" not in lines[-1]:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-400:]}")
    return {**json.loads(lines[-1]), "others": round(max(0, others), 2)}


def measure(args):
    for _ in range(args.rounds):
        for name, command, environment in paths(args):
            if args.only and name not in args.only:
                continue
            for _ in range(3):
                result = run(command, environment)
                if result["others"] <= args.others:
                    break
            line = {"path": name, "block": args.block, **result}
            with open(args.out, "a") as out:
                out.write(json.dumps(line) + "\n")


def table(path, others):
    runs = {}
    for line in map(json.loads, open(path)):
        runs.setdefault(line["block"], {}).setdefault(line["path"], []).append(line)
    for block, rows in sorted(runs.items()):
        print(f"\n| path, blocks of {block:,} B | GB/s | CPU s/GB | send | receive | p50 ms | runs, disturbed |")
        print("|---|--:|--:|--:|--:|--:|--:|")
        for name, lines in rows.items():
            middle = lambda of: statistics.median(of(line) for line in lines)
            least, most = (of(line["gbps"] for line in lines) for of in (min, max))
            send, receive = "cpu_send_s_per_gb", "cpu_recv_s_per_gb"
            disturbed = sum(line["others"] > others for line in lines)
            print(
                f"| {name} | {middle(lambda l: l['gbps']):.2f} ({least:.2f}–{most:.2f}) "
                f"| {middle(lambda l: l[send] + l[receive]):.2f} | {middle(lambda l: l[send]):.2f} "
                f"| {middle(lambda l: l[receive]):.2f} | {middle(lambda l: l['p50_us']) / 1e3:.2f} | {len(lines)}, {disturbed} |"
            )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--table", help="print the table of a file of results")
    p.add_argument("--trireme", help="our binary")
    p.add_argument("--nixl-python", help="an interpreter that has NIXL: also where our RDMA path finds its library")
    p.add_argument("--nixl-harness", help="a harness that takes our flags and drives NIXL from Rust, if there is one")
    p.add_argument("--mooncake-python", help="an interpreter that has Mooncake")
    p.add_argument("--block", type=int, default=9216, help="bytes of a block")
    p.add_argument("--total-mib", type=int, default=512, help="what is timed of each run")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--only", action="append", help="a path's name; may be given several times")
    p.add_argument("--others", type=float, default=0.12, help="cores that others may use during a run")
    p.add_argument("--out", default="kv.jsonl")
    args = p.parse_args()
    if args.table:
        return table(args.table, args.others)
    if not args.trireme:
        p.error("--trireme or --table")
    measure(args)


if __name__ == "__main__":
    main()
