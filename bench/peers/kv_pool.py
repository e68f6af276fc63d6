"""What the peers of `trireme bench transfer` share: its flags, its pools, the order in which it walks them, its line of JSON."""
import argparse
import json
import mmap
import os
import resource

import numpy

POOL_BYTES = 256 << 20
UNTOUCHED = 0x0101010101010101
MULTIPLIER = numpy.uint64(0x9E3779B97F4A7C15)


def arguments(argv=None):
    p = argparse.ArgumentParser()
    p.add_argument("--receive", action="store_true", help="is the receiving process")
    p.add_argument("--block", type=int, default=9216)
    p.add_argument("--msg-kib", type=int, default=2048)
    p.add_argument("--inflight", type=int, default=8)
    p.add_argument("--total-mib", type=int, default=768)
    p.add_argument("--warm-mib", type=int, default=128)
    p.add_argument("--pin-send", type=int, default=-1)
    p.add_argument("--pin-recv", type=int, default=-1)
    args = p.parse_args(argv)
    core = args.pin_recv if args.receive else args.pin_send
    if core >= 0:
        os.sched_setaffinity(0, {core})
    args.blocks = POOL_BYTES // args.block
    args.per_message = max(1, args.msg_kib * 1024 // args.block)
    args.message_bytes = args.per_message * args.block
    args.messages = max(1, args.total_mib * (1 << 20) // args.message_bytes)
    args.warm = max(2, args.warm_mib * (1 << 20) // args.message_bytes)
    return args


class Pool:
    """Equal blocks; a source's hold a word made of their number, a destination's what nobody has written."""

    def __init__(self, args, filled):
        self.memory = mmap.mmap(-1, POOL_BYTES)
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        words = numpy.frombuffer(self.memory, dtype=numpy.uint64)
        words[:] = UNTOUCHED
        self.blocks = words[: args.blocks * args.block // 8].reshape(args.blocks, args.block // 8)
        self.address = words.ctypes.data
        if filled:
            self.blocks[:] = stamps(args)[:, None]

    def verify(self, args):
        """Blocks that hold what their source holds, and those that hold something else."""
        got = self.blocks[destinations(args, numpy.arange(args.blocks))]
        right = (got == stamps(args)[:, None]).all(axis=1)
        untouched = (got == UNTOUCHED).all(axis=1)
        return int(right.sum()), int((~right & ~untouched).sum())


def stamps(args):
    return (numpy.arange(args.blocks, dtype=numpy.uint64) + numpy.uint64(1)) * MULTIPLIER


def coprime(step, blocks, otherwise):
    while numpy.gcd(step, blocks) != 1:
        step = otherwise(step)
    return step


def destinations(args, sources):
    step = coprime(7919 % args.blocks, args.blocks, lambda _: 1)
    return (sources * step + 13) % args.blocks


def message(args, number):
    """The sources of a message, in an order that both processes know."""
    step = coprime(104_729 % args.blocks, args.blocks, lambda step: step + 1)
    first = number * args.per_message
    return (numpy.arange(first, first + args.per_message) % args.blocks) * step % args.blocks


def cpu_time():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def report(args, mode, seconds, latencies, cpu_send, cpu_recv, verified):
    latencies.sort()
    at = lambda share: round(latencies[int((len(latencies) - 1) * share)] * 1e6, 1)
    gb = args.messages * args.message_bytes / 1e9
    right, wrong = verified
    print(json.dumps({
        "mode": mode, "gbps": round(gb / seconds, 3), "p50_us": at(0.5), "p99_us": at(0.99), "max_us": at(1),
        "cpu_send_s_per_gb": round(cpu_send / gb, 3), "cpu_recv_s_per_gb": round(cpu_recv / gb, 3),
        "msg": args.message_bytes, "block": args.block, "msgs": args.messages, "inflight": args.inflight,
        "verify": f"ok={right} bad={wrong}",
    }), flush=True)
    if wrong:
        raise SystemExit(f"{wrong} blocks are wrong")
