#!/usr/bin/env python3
"""What happens where CUDA fails: every case must end in a message that says what is wrong, and nothing else may suffer.

usage: gpu_failures.py TRIREME

Prints a line a case, PASS or FAIL, and what was said. Takes the GPU's memory with PyTorch where a case needs that.
"""

import glob, json, os, signal, subprocess, sys, tempfile, threading, time, urllib.request

TRIREME = sys.argv[1]
PORT = 8133
failed = 0


def report(name, passed, said):
    global failed
    failed += not passed
    print(f"{'PASS' if passed else 'FAIL'} {name}: {' '.join(said.split())[:300]}", flush=True)


def engine(environment, *flags, timeout=120):
    """Exit status and output of one engine on the GPU."""
    command = [TRIREME, "bench", "engine", "--device", "cuda:0", "--batch", "1", "--gen", "2", "--prefill", "1x64",
               "--prompt", "64", *flags]
    done = subprocess.run(command, env=dict(os.environ, **environment), capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout + done.stderr


def said(text, *words):
    return all(word.lower() in text.lower() for word in words)


def last_words(text):
    return " ".join(line for line in text.splitlines() if "rror" in line or "aused" in line or "WARN" in line or "no " in line) or text


class Eater:
    """Another process that leaves so many GiB of the GPU's memory free."""

    def __init__(self, free_gib):
        code = (
            "import torch, time, sys\n"
            "free, _ = torch.cuda.mem_get_info()\n"
            f"held = torch.empty(int(free - {free_gib} * 2**30), dtype=torch.uint8, device='cuda')\n"
            "print('holding', flush=True)\n"
            "time.sleep(300)\n"
        )
        self.process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        self.process.stdout.readline()

    def stop(self):
        self.process.kill()
        self.process.wait()
        time.sleep(1)


class Cluster:
    def __init__(self, environment, *flags):
        self.lines = []
        self.process = subprocess.Popen(
            [TRIREME, "up", "--quiet", "--port", str(PORT), "--device", "cuda:0", "--expert", "0", *flags],
            env=dict(os.environ, RUST_LOG="info", **environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.ready = threading.Event()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.lines.append(line)
            if "Ctrl-C stops" in line:
                self.ready.set()
        self.ready.set()

    def text(self):
        return "".join(self.lines)

    def ask(self, prompt="What is a planet?", tokens=32, timeout=60):
        body = json.dumps(dict(model="trireme-tiny", prompt=prompt, max_tokens=tokens, temperature=0.0, logprobs=1)).encode()
        url = f"http://127.0.0.1:{PORT}/v1/completions"
        request = urllib.request.Request(url, body, {"content-type": "application/json"})
        choice = json.load(urllib.request.urlopen(request, timeout=timeout))["choices"][0]
        return choice["text"], json.dumps(choice["logprobs"])

    def pid(self, role):
        """The process of a worker."""
        for path in glob.glob("/proc/[0-9]*/cmdline"):
            words = open(path, "rb").read().split(b"\0")
            if role.encode() in words and b"--id" in words:
                return int(path.split("/")[2])
        return None

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start_failures():
    status, text = engine({"CUDA_VISIBLE_DEVICES": ""})
    report("no device", status != 0 and said(text, "device"), last_words(text))
    status, text = engine({"CUDA_VISIBLE_DEVICES": "9"})
    report("a device that is not there", status != 0 and said(text, "device"), last_words(text))
    with tempfile.TemporaryDirectory() as cache:
        status, text = engine({"LD_LIBRARY_PATH": "", "XDG_CACHE_HOME": cache})
        if status == 0:
            print("skip no compiler: it is found without LD_LIBRARY_PATH", flush=True)
        else:
            report("no compiler, nothing cached", said(text, "nvrtc"), last_words(text))
    with tempfile.TemporaryDirectory() as cache:
        engine({"XDG_CACHE_HOME": cache})
        for index, path in enumerate(sorted(glob.glob(f"{cache}/trireme/kernels/*.cubin"))):
            whole = open(path, "rb").read()
            damaged = [whole[: len(whole) // 2], b"", bytes(len(whole)), whole[:100] + b"?" + whole[101:]][index % 4]
            open(path, "wb").write(damaged)
        status, text = engine({"XDG_CACHE_HOME": cache, "RUST_LOG": "info"})
        report("damaged kernels in the cache are compiled anew", status == 0 and said(text, "damaged"), last_words(text))
    status, text = engine({}, "--kv-format", "f32", "--synthetic", "30", timeout=60)
    report("a model larger than the device", status != 0 and said(text, "weights", "free"), last_words(text))
    eater = Eater(8)
    status, text = engine({}, "--synthetic", "6")
    report("another process has the memory", status != 0 and said(text, "weights", "free"), last_words(text))
    eater.stop()


def serving_failures():
    cluster = Cluster({"CUDA_VISIBLE_DEVICES": ""})
    cluster.ready.wait(60)
    ended = cluster.process.wait(30) if "Ctrl-C stops" not in cluster.text() else None
    report("up without a device ends and says why", ended not in (None, 0) and said(cluster.text(), "device"), last_words(cluster.text())[-300:])

    cluster = Cluster({}, "--kv-blocks-max", "4000000")
    cluster.ready.wait(60)
    ended = cluster.process.wait(30) if "Ctrl-C stops" not in cluster.text() else None
    report("up with a cache that does not fit says what would", ended not in (None, 0) and said(cluster.text(), "blocks"),
           last_words(cluster.text())[-300:])

    cluster = Cluster({}, "--prefill", "2", "--decode", "2")
    cluster.ready.wait(120)
    expected = cluster.ask(tokens=200)
    answers, errors = [], []

    def client():
        try:
            answers.append(cluster.ask(tokens=200))
        except Exception as error:
            errors.append(repr(error))

    # The supervisor starts them anew.
    for role in ["decode", "prefill"]:
        answers.clear(), errors.clear()
        threads = [threading.Thread(target=client) for _ in range(24)]
        [thread.start() for thread in threads]
        time.sleep(0.05)
        killed = cluster.pid(role)
        if killed:
            os.kill(killed, signal.SIGKILL)
        [thread.join() for thread in threads]
        same = sum(answer == expected for answer in answers)
        # A request whose answer has begun is lost with its decode worker; nobody else notices.
        lost = sum("502" in error for error in errors) if role == "decode" else 0
        time.sleep(3)
        after = cluster.ask(tokens=200) == expected
        report(f"one of two {role} workers of the GPU dies under load", killed is not None and same + lost == 24 and after,
               f"{same} of 24 answers as before, {lost} lost; afterwards {'as before' if after else 'WRONG'} {errors[:1]}")
    eater = Eater(0.05)
    answers.clear(), errors.clear()
    threads = [threading.Thread(target=client) for _ in range(200)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    wrong = sum(answer != expected for answer in answers)
    eater.stop()
    time.sleep(5)
    try:
        after = cluster.ask(tokens=200) == expected
    except Exception as error:
        after, errors = False, errors + [repr(error)]
    report("the device's memory is taken while 200 are served", wrong == 0 and after,
           f"{len(answers) - wrong} answers as before, {wrong} others, {len(errors)} refused {errors[:1]}; afterwards {'as before' if after else 'WRONG'}")
    cluster.stop()


start_failures()
serving_failures()
sys.exit(failed > 0)
