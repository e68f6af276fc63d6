#!/usr/bin/env python3
"""What happens where CUDA fails: every case must end in a message that says what is wrong, and nothing else may suffer.

usage: gpu_failures.py TRIREME [KERNELS [LOGS]]

Prints a line a case, PASS or FAIL, and what was said. Takes the GPU's memory with PyTorch where a case needs that. KERNELS is a
folder of prebuilt kernels: with it also what happens without a compiler, and when a kernel faults in a worker that serves, whose
log is kept in LOGS.
Runs in the repository's root, as root where libraries are to be hidden.
"""

import ctypes, datetime, glob, json, os, re, shlex, shutil, signal, subprocess, sys, tempfile, threading, time, urllib.request

TRIREME = sys.argv[1]
KERNELS = sys.argv[2] if len(sys.argv) > 2 and os.path.isdir(sys.argv[2]) else None
logs = sys.argv[3] if len(sys.argv) > 3 else None
NVRTC = "libnvrtc.so.13"
PORT = 8133
# Prompts are short here, and would else be computed on decode.
TWO_EACH = ["--prefill", "2", "--decode", "2", "--prefill-on-decode", "never"]
failed = 0


def report(name, passed, said):
    global failed
    failed += not passed
    print(f"{'PASS' if passed else 'FAIL'} {name}: {' '.join(said.split())[:700]}", flush=True)


def engine(environment, *flags, timeout=120, program=TRIREME, inside=()):
    """Exit status and output of one engine on the GPU."""
    command = [*inside, program, "bench", "engine", "--device", "cuda:0", "--batch", "1", "--gen", "2",
               "--prefill", "1x64", "--prompt", "64", *flags]
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
    def __init__(self, environment, *flags, program=TRIREME, experts=0):
        self.lines = []
        self.process = subprocess.Popen(
            [program, "up", "--quiet", "--port", str(PORT), "--device", "cuda:0", "--expert", str(experts), *flags],
            env=dict(os.environ, TRIREME_LOG="info", **environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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

    def worker(self, role):
        """Process and id of one of its workers."""
        for path in glob.glob("/proc/[0-9]*/cmdline"):
            try:
                words = open(path).read().split("\0")
            except OSError:
                continue
            if role in words and "--id" in words:
                return int(path.split("/")[2]), words[words.index("--id") + 1]
        return None, None

    def log(self, worker):
        return open(f"{tempfile.gettempdir()}/trireme-{self.process.pid}/{worker}.log").read()

    def load(self, expected, clients=24):
        """Asks for the same at once: how many answers were as expected, how many others, and what went wrong."""
        answers, errors = [], []

        def client():
            try:
                answers.append(self.ask(tokens=200))
            except Exception as error:
                # Whole: behind the message, however long, stands the code.
                errors.append(f"{error!r} {error.read().decode() if hasattr(error, 'read') else ''}")

        threads = [threading.Thread(target=client) for _ in range(clients)]
        [thread.start() for thread in threads]
        yield
        [thread.join() for thread in threads]
        same = sum(answer == expected for answer in answers)
        yield same, len(answers) - same, errors

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
        engine({"XDG_CACHE_HOME": cache})
        for index, path in enumerate(sorted(glob.glob(f"{cache}/trireme/kernels/*.cubin"))):
            whole = open(path, "rb").read()
            damaged = [whole[: len(whole) // 2], b"", bytes(len(whole)), whole[:100] + b"?" + whole[101:]][index % 4]
            open(path, "wb").write(damaged)
        status, text = engine({"XDG_CACHE_HOME": cache, "TRIREME_LOG": "info"})
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

    cluster = Cluster({}, *TWO_EACH)
    cluster.ready.wait(120)
    expected = cluster.ask(tokens=200)

    # The supervisor starts them anew.
    for role in ["decode", "prefill"]:
        load = cluster.load(expected)
        next(load)
        time.sleep(0.05)
        killed, _ = cluster.worker(role)
        if killed:
            os.kill(killed, signal.SIGKILL)
        same, _, errors = next(load)
        # A request whose answer has begun is lost with its decode worker; nobody else notices.
        lost = sum("502" in error for error in errors) if role == "decode" else 0
        time.sleep(3)
        after = cluster.ask(tokens=200) == expected
        report(f"one of two {role} workers of the GPU dies under load", killed is not None and same + lost == 24 and after,
               f"{same} of 24 answers as before, {lost} lost; afterwards {'as before' if after else 'WRONG'} {errors[:1]}")
    eater = Eater(0.05)
    load = cluster.load(expected, clients=200)
    next(load)
    same, wrong, errors = next(load)
    eater.stop()
    time.sleep(5)
    try:
        after = cluster.ask(tokens=200) == expected
    except Exception as error:
        after, errors = False, errors + [repr(error)]
    report("the device's memory is taken while 200 are served", wrong == 0 and after,
           f"{same} answers as before, {wrong} others, {len(errors)} refused {errors[:1]}; afterwards {'as before' if after else 'WRONG'}")
    cluster.stop()


def shipped():
    """The program as it is shipped to a machine without a compiler: kernels in a folder beside it."""
    folder = tempfile.mkdtemp()
    shutil.copytree(KERNELS, f"{folder}/kernels")
    return shutil.copy(TRIREME, folder)


def without_nvrtc():
    """What a command is to be put behind so that it finds no NVRTC: a name space in which the libraries are empty files."""
    search = ["find", "/", "-name", "libnvrtc.so*", "-type", "f", "-not", "-path", "/proc/*"]
    libraries = subprocess.run(search, capture_output=True, text=True).stdout.split()
    hide = "".join(f"mount --bind /dev/null {shlex.quote(library)}; " for library in libraries)
    return ["unshare", "--mount", "sh", "-ec", hide + 'exec "$@"', "sh"]


def compiler_failures():
    hidden = without_nvrtc()
    with tempfile.TemporaryDirectory() as cache:
        environment = {"XDG_CACHE_HOME": cache, "TRIREME_LOG": "info"}
        status, text = engine(environment, inside=hidden)
        report("no compiler, nothing cached, nothing shipped", status != 0 and said(text, "nvrtc", "ld_library_path", "kernels"),
               last_words(text))
        status, text = engine(environment, inside=hidden, program=shipped())
        loaded = " ".join(line for line in text.splitlines() if "kernels loaded" in line)
        report("no compiler, but kernels beside the program", status == 0 and said(loaded, "compiled=0", "cached=0"), loaded or text[-300:])


def sabotage(folder, kernel, launches):
    """Puts into `folder`, under its own name, a kernel that faults at its n-th launch (`launches`), and returns the good one."""
    texts = [open(f"compute/kernels/{name}.cu").read() for name in ("numbers", kernel)]
    fault = f"""
        __device__ unsigned times_run;
        __device__ __forceinline__ void fault() {{
            if (blockIdx.x + blockIdx.y + threadIdx.x == 0 && atomicAdd(&times_run, 1u) + 1u == {launches}u) __trap();
        }}
    """
    entries = re.compile(r'extern "C" __global__[^{;]*\{')
    texts[1], count = entries.subn(lambda entry: entry.group() + " fault();", texts[1])
    assert count > 0, f"{kernel}.cu has no entry"
    text = "\n".join([texts[0], fault, texts[1]]).encode()
    nvrtc = ctypes.CDLL(NVRTC)
    program, options = ctypes.c_void_p(), [b"--std=c++17", b"--fmad=false", b"--gpu-architecture=sm_90a"]
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, None, 0, None, None)
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    assert failed == 0, f"NVRTC: {failed}"
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, code)
    import xxhash  # what the checksum behind a built kernel is

    [path] = glob.glob(f"{folder}/{kernel}-sm_90a-*.cubin")
    good = open(path, "rb").read()
    assert good[-16:] == xxhash.xxh3_128_intdigest(good[:-16]).to_bytes(16, "little"), "another checksum than expected"
    replace(path, code.raw + xxhash.xxh3_128_intdigest(code.raw).to_bytes(16, "little"))
    return path, good


def replace(path, contents):
    open(path + ".new", "wb").write(contents)
    os.rename(path + ".new", path)


def within(seconds, holds):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def kernel_fault(cluster, kernels, role, kernel, launches, expected):
    """One worker of a serving cluster is started anew with a kernel that faults under load, and after that with the good one."""
    pid, worker = cluster.worker(role)
    path, good = sabotage(kernels, kernel, launches)
    ups = lambda: cluster.log(worker).count("worker is up")
    os.kill(pid, signal.SIGKILL)
    started = within(20, lambda: ups() >= 2)
    replace(path, good)
    time.sleep(1)
    same = wrong = lost = asked = 0
    errors = []
    while "CUDA_ERROR" not in cluster.log(worker) and asked < 10 * 24:
        load = cluster.load(expected)
        next(load)
        right, others, failed = next(load)
        same, wrong, lost, asked, errors = same + right, wrong + others, lost + len(failed), asked + 24, errors + failed
    said_so = [line for line in cluster.log(worker).splitlines() if "CUDA_ERROR" in line]
    again = within(20, lambda: ups() >= 3)
    lines = cluster.log(worker).splitlines()
    moment = lambda word: [datetime.datetime.fromisoformat(line.split()[0].rstrip("Z")) for line in lines if word in line]
    away = (moment("worker is up")[-1] - moment("CUDA_ERROR")[0]).total_seconds() if again and said_so else 0
    if logs:
        open(f"{logs}/failures-{worker}.log", "w").write(cluster.log(worker))
    time.sleep(1)
    after = cluster.load(expected)
    next(after)
    after = next(after)[0] == 24
    # Answers that had begun are lost with the worker (of the only holder of an expert: all); nobody else notices.
    excused = all("worker_lost" in error for error in errors)
    passed = started and bool(said_so) and said(said_so[0], "kernel", "faulted") and wrong == 0 and excused and again and after
    words = said_so[0] if said_so else cluster.log(worker)[-600:]
    report(f"a kernel faults in one {role} worker under load", passed,
           f"{same} of {asked} answers as before, {wrong} others, {lost} lost; "
           f"{f'back after {away:.2f} s' if again else 'it did not come back'}; afterwards {'as before' if after else 'WRONG'}; "
           f"it said: {words}; clients: {errors[:1]}")


def kernel_failures():
    try:
        ctypes.CDLL(NVRTC)
    except OSError as error:
        print(f"skip kernels that fault: {error}", flush=True)
        return
    for experts, roles in [(0, [("decode", "embed", 40), ("prefill", "embed", 3)]), (2, [("expert", "swiglu", 300)])]:
        program = shipped()
        with tempfile.TemporaryDirectory() as cache:
            cluster = Cluster({"XDG_CACHE_HOME": cache}, *TWO_EACH, program=program, experts=experts)
            cluster.ready.wait(120)
            expected = cluster.ask(tokens=200)
            for role, kernel, launches in roles:
                try:
                    kernel_fault(cluster, os.path.dirname(program) + "/kernels", role, kernel, launches, expected)
                except Exception as error:
                    report(f"a kernel faults in one {role} worker under load", False, repr(error) + cluster.text()[-300:])
            cluster.stop()


start_failures()
if KERNELS:
    compiler_failures()
    kernel_failures()
else:
    print("skip what needs prebuilt kernels", flush=True)
serving_failures()
sys.exit(failed > 0)
