#!/usr/bin/env python3
"""One process on the CPU beside llama.cpp and transformers: the same checkpoint, one sitting, alternating rounds.

    python bench/peers/cpu.py --trireme target/release/trireme --fp8 DIR --bf16 DIR \
        --llama-bin DIR --gguf bf16.gguf q8_0.gguf --threads 2 --rounds 3 --out results.jsonl
    python bench/peers/cpu.py --table results.jsonl

Each round runs every engine that was named once; a round is appended to --out as it ends, so that rounds may be run
in several calls on a machine that is quiet only for a while. The table has the median of all rounds in the file, with
the slowest and the fastest. Wanted: a checkpoint in FP8 (--fp8) and the same dimensions in BF16 (--bf16), its GGUF
conversions, llama.cpp's llama-batched-bench, and torch with transformers in this interpreter for --hf.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time


def trireme(args):
    """Prompt and generation tokens per second of `trireme bench engine`."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [args.trireme, "bench", "engine"] if not args.engine else [args.engine]
        command += ["--model", args.fp8, "--threads", str(args.threads), "--batch", ",".join(map(str, args.batch))]
        command += ["--prompt", str(args.prompt), "--gen", str(args.gen), "--rounds", "1", "--json", out.name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = json.load(open(out.name))
    for b in report["batches"]:
        yield {
            "engine": "trireme FP8", "batch": b["batch"], "prompt": b["prompt_tok_per_s"]["median"],
            "generation": b["generation_tok_per_s"]["median"], "reads_gb_per_s": report["read_gb_per_s"]["median"],
            "share": b["bandwidth_share"]["median"],
        }


def llama(args, model):
    """llama-batched-bench: prompts of all sequences, then one token of each per step."""
    context = max(args.batch) * (args.prompt + args.gen)
    command = [os.path.join(args.llama_bin, "llama-batched-bench"), "-m", model, "-t", str(args.threads)]
    command += ["-tb", str(args.threads), "-npp", str(args.prompt), "-ntg", str(args.gen), "-c", str(context)]
    command += ["-npl", ",".join(map(str, args.batch)), "--output-format", "jsonl"]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    for line in filter(lambda line: line.startswith("{"), run.stdout.splitlines()):
        b = json.loads(line)
        name = "llama.cpp " + os.path.splitext(os.path.basename(model))[0]
        yield {"engine": name, "batch": b["pl"], "prompt": b["speed_pp"], "generation": b["speed_tg"]}


HF = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
path, threads, prompt, gen, batches = sys.argv[1], *json.loads(sys.argv[2])
torch.set_num_threads(threads)
m = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, attn_implementation="sdpa",
                                         experts_implementation="grouped_mm").eval()
g = torch.Generator().manual_seed(0)
for batch in batches:
    for warm in (True, False):
        ids = torch.randint(3, m.config.vocab_size - 400, (batch, prompt), generator=g)
        with torch.inference_mode():
            t0 = time.perf_counter()
            o = m(ids, use_cache=True, logits_to_keep=1)
            t1 = time.perf_counter()
            steps = 4 if warm else gen
            for _ in range(steps):
                o = m(o.logits[:, -1].argmax(-1, keepdim=True), past_key_values=o.past_key_values, use_cache=True)
            t2 = time.perf_counter()
    print(json.dumps(dict(engine="transformers BF16", batch=batch, prompt=batch * prompt / (t1 - t0),
                          generation=batch * steps / (t2 - t1))), flush=True)
"""


def transformers(args):
    """transformers with its grouped experts; 32 steps are enough at its pace."""
    numbers = [args.threads, args.prompt, min(args.gen, 32), args.hf_batch]
    run = subprocess.run([sys.executable, "-c", HF, args.bf16, json.dumps(numbers)], check=True,
                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    yield from map(json.loads, run.stdout.splitlines())


def table(path):
    rows = {}
    for line in open(path):
        figure = json.loads(line)
        rows.setdefault((figure["engine"], figure["batch"]), []).append(figure)
    print("| engine | batch | rounds | prompt tok/s | generated tok/s |\n|---|--:|--:|--:|--:|")
    for (engine, batch), figures in sorted(rows.items(), key=lambda row: (row[0][1], row[0][0])):
        def spread(key):
            values = [figure[key] for figure in figures]
            return f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})"
        print(f"| {engine} | {batch} | {len(figures)} | {spread('prompt')} | {spread('generation')} |")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--table", metavar="FILE", help="print the table of a results file and end")
    ap.add_argument("--trireme", default="target/release/trireme")
    ap.add_argument("--engine", help="a program that takes the flags of `trireme bench engine`")
    ap.add_argument("--fp8", help="checkpoint for trireme")
    ap.add_argument("--bf16", help="checkpoint for transformers")
    ap.add_argument("--llama-bin", help="folder of llama-batched-bench")
    ap.add_argument("--gguf", nargs="*", default=[])
    ap.add_argument("--hf", action="store_true", help="run transformers too")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    ap.add_argument("--hf-batch", type=int, nargs="+", default=[1, 8])
    ap.add_argument("--prompt", type=int, default=256)
    ap.add_argument("--gen", type=int, default=64)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--out", default="cpu-peers.jsonl")
    args = ap.parse_args()
    if args.table:
        return table(args.table)
    for _ in range(args.rounds):
        runs = [lambda: trireme(args)] if args.fp8 else []
        runs += [lambda model=model: llama(args, model) for model in args.gguf]
        runs += [lambda: transformers(args)] if args.hf else []
        for run in runs:
            for figure in run():
                figure |= {"at": time.strftime("%H:%M:%S"), "threads": args.threads}
                print(json.dumps(figure), flush=True)
                with open(args.out, "a") as out:
                    out.write(json.dumps(figure) + "\n")


if __name__ == "__main__":
    main()
