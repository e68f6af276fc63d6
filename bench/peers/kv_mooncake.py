#!/usr/bin/env python3
"""Mooncake's transfer engine over TCP as a peer of `trireme bench transfer`: a batch of writes for each message.

A message is done when the engine says that its batch is; batches are waited for in order.
"""
import json
import os
import subprocess
import sys
import time

os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
os.environ.setdefault("MC_FORCE_TCP", "1")
from mooncake.engine import TransferEngine  # noqa: E402

import kv_pool  # noqa: E402


def engine(pool):
    made = TransferEngine()
    assert made.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert made.register_memory(pool.address, kv_pool.POOL_BYTES) == 0
    return made


def receive(args):
    pool = kv_pool.Pool(args, filled=False)
    target = engine(pool)
    print(json.dumps([target.get_rpc_port(), pool.address]), flush=True)
    before = 0
    for line in sys.stdin:
        if line.strip() == "begin":
            before = kv_pool.cpu_time()
            print(json.dumps([]), flush=True)
        else:
            print(json.dumps([kv_pool.cpu_time() - before, *pool.verify(args)]), flush=True)


def main():
    args = kv_pool.arguments()
    if args.receive:
        return receive(args)
    pool = kv_pool.Pool(args, filled=True)
    initiator = engine(pool)
    command = [sys.executable, __file__, "--receive", *sys.argv[1:]]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # The engine writes to standard output too.
    answer = lambda: json.loads(next(line for line in child.stdout if line.startswith("[")))

    def ask(question):
        child.stdin.write(question + "\n")
        child.stdin.flush()
        return answer()

    port, remote = answer()
    lengths = [args.block] * args.per_message
    under_way, latencies = [], []

    def finish_oldest():
        batch, begun = under_way.pop(0)
        assert initiator.get_batch_transfer_status([batch]) == 0
        latencies.append(time.perf_counter() - begun)

    def send(numbers):
        for number in numbers:
            if len(under_way) >= args.inflight:
                finish_oldest()
            sources = kv_pool.message(args, number)
            from_ = (pool.address + sources * args.block).tolist()
            to = (remote + kv_pool.destinations(args, sources) * args.block).tolist()
            begun = time.perf_counter()
            batch = initiator.batch_transfer_async_write(f"127.0.0.1:{port}", from_, to, lengths)
            assert batch > 0, batch
            under_way.append((batch, begun))
        while under_way:
            finish_oldest()

    send(range(args.warm))
    ask("begin")
    latencies.clear()
    start, before = time.perf_counter(), kv_pool.cpu_time()
    send(range(args.warm, args.warm + args.messages))
    seconds, used = time.perf_counter() - start, kv_pool.cpu_time() - before
    cpu_recv, *verified = ask("stop")
    kv_pool.report(args, "mooncake tcp", seconds, latencies, used, cpu_recv, verified)
    child.kill()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
