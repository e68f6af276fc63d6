#!/usr/bin/env python3
"""NIXL over UCX as a peer of `trireme bench transfer`: one write of all of a message's blocks, a notification, an answer.

UCX_TLS chooses the transport. Descriptors of both pools are prepared once, as vLLM does; both processes poll.
"""
import json
import os
import subprocess
import sys
import time

from nixl_cu12 import nixl_agent, nixl_agent_config

import kv_pool


def agent(name, pool):
    made = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    made.register_memory([(pool.address, kv_pool.POOL_BYTES, 0, "")], "DRAM")
    return made


def receive(args):
    pool = kv_pool.Pool(args, filled=False)
    target = agent("target", pool)
    print(json.dumps({"metadata": target.get_agent_metadata().hex(), "address": pool.address}), flush=True)
    target.add_remote_agent(bytes.fromhex(sys.stdin.readline().strip()))
    before = 0
    while True:
        for sender, notices in target.get_new_notifs().items():
            for notice in notices:
                if notice == b"begin":
                    before = kv_pool.cpu_time()
                    target.send_notif(sender, b"begun")
                elif notice == b"stop":
                    used = kv_pool.cpu_time() - before
                    target.send_notif(sender, b"end" + json.dumps([used, *pool.verify(args)]).encode())
                elif notice == b"quit":
                    return
                else:
                    target.send_notif(sender, b"got" + notice)


class Sender:
    def __init__(self, args):
        self.args, self.pool = args, kv_pool.Pool(args, filled=True)
        command = [sys.executable, __file__, "--receive", *sys.argv[1:]]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.agent = agent("initiator", self.pool)
        # NIXL's plugins write to standard output too.
        line = next(line for line in self.child.stdout if line.startswith("{"))
        theirs = json.loads(line)
        self.child.stdin.write(self.agent.get_agent_metadata().hex() + "\n")
        self.child.stdin.flush()
        self.peer = self.agent.add_remote_agent(bytes.fromhex(theirs["metadata"]))
        numbers = kv_pool.numpy.arange(args.blocks)
        places = lambda start, at: [(int(start + place * args.block), args.block, 0) for place in at]
        ours, remote = places(self.pool.address, numbers), places(theirs["address"], kv_pool.destinations(args, numbers))
        self.ours = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", ours, "DRAM")
        self.theirs = self.agent.prep_xfer_dlist(self.peer, remote, "DRAM")
        self.under_way, self.latencies, self.said = {}, [], []

    def poll(self):
        # The asking is what sends a write's notification.
        for entry in self.under_way.values():
            entry[2] = entry[2] or self.agent.check_xfer_state(entry[1]) == "DONE"
        for notices in self.agent.get_new_notifs().values():
            for notice in notices:
                if not notice.startswith(b"got"):
                    self.said.append(notice)
                    continue
                begun, handle, done = self.under_way.pop(int(notice[3:]))
                self.latencies.append(time.perf_counter() - begun)
                while not done:
                    done = self.agent.check_xfer_state(handle) == "DONE"
                self.agent.release_xfer_handle(handle)

    def ask(self, question):
        self.agent.send_notif(self.peer, question)
        while not self.said:
            self.poll()
        return self.said.pop()

    def send(self, number):
        while len(self.under_way) >= self.args.inflight:
            self.poll()
        blocks = kv_pool.message(self.args, number).astype(kv_pool.numpy.int32)
        begun = time.perf_counter()
        handle = self.agent.make_prepped_xfer("WRITE", self.ours, blocks, self.theirs, blocks, str(number).encode())
        state = self.agent.transfer(handle)
        assert state != "ERR", state
        self.under_way[number] = [begun, handle, state == "DONE"]
        self.poll()

    def drain(self):
        while self.under_way:
            self.poll()


def main():
    args = kv_pool.arguments()
    if args.receive:
        return receive(args)
    sender = Sender(args)
    for number in range(args.warm):
        sender.send(number)
    sender.drain()
    assert sender.ask(b"begin") == b"begun"
    sender.latencies.clear()
    start, before = time.perf_counter(), kv_pool.cpu_time()
    for number in range(args.warm, args.warm + args.messages):
        sender.send(number)
    sender.drain()
    seconds, used = time.perf_counter() - start, kv_pool.cpu_time() - before
    cpu_recv, *verified = json.loads(sender.ask(b"stop")[3:])
    sender.agent.send_notif(sender.peer, b"quit")
    tls = os.environ.get("UCX_TLS", "all")
    kv_pool.report(args, f"nixl {tls}", seconds, sender.latencies, used, cpu_recv, verified)
    sender.child.wait(10)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Past the destructors of the libraries, which may wait for peers that are gone.
    os._exit(0)
