#!/usr/bin/env python3
"""Serves the demo model on a GPU, as several processes, and says what came of it.

usage: gpu_serve.py TRIREME [DEVICE...]

For each shape of cluster (experts inside prefill and decode, experts as two workers of their own): the time from the process'
start to the first token, with kernels to compile and with kernels cached; then the same requests, greedy and drawn from
seeds, one at a time and together. Every shape must answer with the same tokens and log-probabilities. With two devices prefill
and decode run on one each, either way round, experts inside or on a worker of each device, and must answer as one device does.
"""

import json, os, re, signal, subprocess, sys, tempfile, threading, time, urllib.request

PORT = 8123
REQUESTS = [
    dict(prompt="What is a planet?", max_tokens=48, temperature=0.0),
    dict(prompt="Once upon a time", max_tokens=48, temperature=0.8, top_p=0.9, seed=7),
    dict(prompt="The sea is", max_tokens=48, temperature=1.2, top_k=40, seed=8, presence_penalty=0.5),
    dict(prompt="A stone rolled down the hill and", max_tokens=48, temperature=0.7, min_p=0.05, seed=9, frequency_penalty=0.3),
    dict(prompt="One two three four five six seven eight nine ten " * 12, max_tokens=32, temperature=0.9, seed=10, logprobs=3),
]


def up(trireme, flags, cache):
    """A started cluster and the seconds to its first token."""
    begin = time.monotonic()
    environment = dict(os.environ, XDG_CACHE_HOME=cache)
    process = subprocess.Popen(
        [trireme, "up", "--port", str(PORT), *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    first, seen, errors = None, b"", []
    threading.Thread(target=lambda: errors.append(process.stderr.read()), daemon=True).start()
    while b"Ctrl-C stops" not in seen:
        piece = os.read(process.stdout.fileno(), 4096)
        if not piece:
            process.wait()
            time.sleep(0.2)
            sys.exit(f"up {flags} ended: {seen.decode()[-1500:]} {b''.join(errors).decode()[-3000:]}")
        seen += piece
        if first is None and re.search(rb"> What is a planet\?\n.", seen):
            first = time.monotonic() - begin
    return process, first


def down(process):
    process.send_signal(signal.SIGINT)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


def complete(request):
    body = json.dumps(dict(request, model=MODEL, stream=False)).encode()
    url = f"http://127.0.0.1:{PORT}/v1/completions"
    answer = urllib.request.urlopen(urllib.request.Request(url, body, {"content-type": "application/json"}), timeout=120)
    choice = json.load(answer)["choices"][0]
    return choice["text"], json.dumps(choice.get("logprobs"))


def answers():
    one_by_one = [complete(request) for request in REQUESTS]
    together = [None] * len(REQUESTS)

    def ask(index):
        together[index] = complete(REQUESTS[index])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(REQUESTS))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return one_by_one, together


def model_name():
    return json.load(urllib.request.urlopen(f"http://127.0.0.1:{PORT}/v1/models"))["data"][0]["id"]


trireme, devices = sys.argv[1], sys.argv[2:] or ["cuda:0"]
status, expected = 0, None
cache = tempfile.mkdtemp()
shapes = [
    ("experts inside, kernels compiled", devices[:1], 0),
    ("experts inside, kernels cached", devices[:1], 0),
    ("2 expert workers, kernels cached", devices[:1], 2),
]
if len(devices) > 1:
    shapes = shapes[1:] + [
        ("prefill and decode on a device each", devices, 0),
        ("the other way round", devices[::-1], 0),
        ("and an expert worker on each", devices, 2),
    ]
for name, on, experts in shapes:
    process, first = up(trireme, ["--device", ",".join(on), "--expert", str(experts)], cache)
    MODEL = model_name()
    one_by_one, together = answers()
    expected = expected or one_by_one
    same = one_by_one == expected and together == expected
    status |= not same
    print(f"up {name}: first token after {first:.2f} s; answers {'the same' if same else 'DIFFER'}", flush=True)
    if not same:
        for index, row in enumerate(zip(expected, one_by_one, together)):
            if len(set(row)) > 1:
                print(f"request {index}: " + " | ".join(text[:100] + (logprobs or "")[:200] for text, logprobs in row))
    down(process)
sys.exit(status)
