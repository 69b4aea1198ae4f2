"""Whole models: `lora-kernels merge` and `quantize` beside PEFT, bitsandbytes and a copy of the file, on the CPU.

    python benches/peers/merge.py --binary target/release/lora-kernels --work DIR [--memory DIR] [--result benches/results/NAME]

Needs torch, transformers, peft and bitsandbytes (tests/interop/requirements.txt). It makes a Llama of 1 GB in bf16 with random
weights and a LoRA of rank 16 on all its projections, and then takes turns: each program in a process of its own, best of --repeats.
With --memory FOLDER, one in memory (a tmpfs; it needs 4 GB), it does so there first and then in --work, so that a slow disk hides nothing.
A peer's time begins after its imports and ends when `save_pretrained` returns; ours and the copy's is that of the whole process, with
everything brought to the disk. Peaks of memory are those of the processes (pages of mapped files included).
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import time

PACKAGES = ["torch", "transformers", "peft", "bitsandbytes", "safetensors"]
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, RANK = 2048, 5632, 9, 8192, 16

# What a process of a peer does. Its own clock starts where the comment says.
PEFT = """
import sys, time, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, adapter, out = sys.argv[1:]
start = time.perf_counter()  # imports are done
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out)
print("seconds", time.perf_counter() - start)
"""
BITSANDBYTES = """
import sys, time, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, out = sys.argv[1:]
start = time.perf_counter()  # imports are done
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", quantization_config=config, device_map="cpu")
model.save_pretrained(out)
print("seconds", time.perf_counter() - start)
"""
COPY = """
import os, sys, time
start = time.perf_counter()
os.makedirs(sys.argv[2])
source, target = (os.open(os.path.join(folder, "model.safetensors"), flags) for folder, flags in [(sys.argv[1], os.O_RDONLY), (sys.argv[2], os.O_WRONLY | os.O_CREAT)])
while data := os.read(source, 1 << 23):
    os.write(target, data)
os.fsync(target)
print("seconds", time.perf_counter() - start)
"""


def make(work):
    """The model and the adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, num_attention_heads=16,
        num_key_value_heads=16, tie_word_embeddings=False, dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(work / "base", max_shard_size="5GB")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.005)
    model.save_pretrained(work / "adapter")


def measure(command):
    """Wall time (by the process' own clock where it tells), processor time and peak resident memory."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} failed: {process.returncode}")
    own = [line.split()[1] for line in output.splitlines() if line.startswith("seconds ")]
    return float(own[0]) if own else seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def machine():
    with contextlib.suppress(OSError):
        names = [line.split(":")[1].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return f"{names[0]}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def turns(args, work):
    """The best of each program with everything in a folder, as rows, and the machine's load before each run."""
    base, adapter, out = work / "base", work / "adapter", work / "out"
    if not adapter.exists():
        # In a process of its own: what starts others should be small, as they inherit its peak.
        subprocess.run([sys.executable, __file__, "--binary", args.binary, "--work", work, "--make"], check=True)
    python = [sys.executable, "-c"]
    programs = {
        "copy": [*python, COPY, base, out],
        "merge: lora-kernels": [args.binary, "merge", base, adapter, "--out", out],
        "merge: PEFT": [*python, PEFT, base, adapter, out],
        "quantise: lora-kernels": [args.binary, "quantize", base, "--double-quant", "--out", out],
        "quantise: bitsandbytes": [*python, BITSANDBYTES, base, out],
    }
    best, loads = {}, []
    for repeat in range(args.repeats):
        for name, command in programs.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            loads.append(os.getloadavg()[0])
            seconds, processor, peak = measure(list(map(str, command)))
            before = best.get(name, (float("inf"), float("inf"), 0))
            best[name] = (min(seconds, before[0]), min(processor, before[1]), max(peak, before[2]))
            print(f"{repeat} {name:<24} {seconds:7.2f} s {processor:7.2f} s of processors {peak:6.0f} MiB  load {loads[-1]:.1f}", flush=True)
    shutil.rmtree(out, ignore_errors=True)
    copy = best["copy"][0]
    rows = [
        {"program": name, "seconds": round(seconds, 3), "times_copy": round(seconds / copy, 2), "processor_seconds": round(processor, 2), "peak_mib": round(peak)}
        for name, (seconds, processor, peak) in best.items()
    ]
    ratios = {
        "merge": round(best["merge: PEFT"][0] / best["merge: lora-kernels"][0], 2),
        "quantise": round(best["quantise: bitsandbytes"][0] / best["quantise: lora-kernels"][0], 2),
    }
    return rows, ratios, loads


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", required=True, type=pathlib.Path)
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--memory", type=pathlib.Path, help="a folder in memory, to take turns in first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=pathlib.Path, help="writes RESULT.json and RESULT.md")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.make:
        return make(args.work)
    places = {"memory": args.memory, "disk": args.work} if args.memory else {"disk": args.work}
    result = {"date": str(datetime.date.today()), "machine": machine(), "repeats": args.repeats}
    result["versions"] = {name: importlib.metadata.version(name) for name in PACKAGES}
    result |= {"rows": [], "peer_over_ours": {}}
    text, all_loads = [], []
    for place, work in places.items():
        rows, ratios, loads = turns(args, work)
        result["bytes"] = (work / "base" / "model.safetensors").stat().st_size
        all_loads += loads
        result["rows"] += [{"place": place} | row for row in rows]
        result["peer_over_ours"][place] = ratios
        text += [
            "", f"## In a folder {'in memory' if place == 'memory' else 'on the disk'}", "",
            "| | seconds | times the copy | seconds of processors | peak memory |", "|---|---|---|---|---|",
            *(f"| {row['program']} | {row['seconds']:.2f} | {row['times_copy']:.2f} | {row['processor_seconds']:.2f} | {row['peak_mib']} MiB |" for row in rows),
            "", f"Merging is {ratios['merge']:.1f} times as fast as PEFT, quantising {ratios['quantise']:.1f} times as fast as bitsandbytes.",
        ]
    result["load"] = [round(min(all_loads), 1), round(max(all_loads), 1)]
    print("\n".join(text))
    if args.result:
        args.result.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        head = [
            f"# Whole models on the CPU, {result['date']}", "",
            f"{result['machine']}; {', '.join(f'{name} {version}' for name, version in result['versions'].items())}. A checkpoint of {result['bytes'] / 1e9:.2f} GB in bf16, "
            f"a LoRA of rank {RANK} on all {7 * LAYERS} projections; best of {args.repeats}, taking turns. The load of the machine before a run was {result['load'][0]} to "
            f"{result['load'][1]}. Made by `benches/peers/merge.py`, which says what is timed.",
        ]
        args.result.with_suffix(".md").write_text("\n".join(head + text) + "\n")


main()
