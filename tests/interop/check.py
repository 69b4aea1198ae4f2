"""Checks with the real packages what the library has written. Started by `run`; prints a row per case."""

import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import json
import logging
import pathlib
import platform
import shutil
import subprocess
import sys
import warnings

import bitsandbytes as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--rewrite", required=True, type=pathlib.Path, help="the built example")
parser.add_argument("--work", required=True, type=pathlib.Path, help="a folder for what is made here")
parser.add_argument("--result", type=pathlib.Path, help="where to write the table")
args = parser.parse_args()

DATA = pathlib.Path(__file__).parents[1] / "data"
WORK = args.work / "files"
STORAGE = ["uint8", "bfloat16", "float16", "float32"]
PACKAGES = ["bitsandbytes", "peft", "transformers", "torch", "safetensors"]

logging.disable(logging.WARNING)
torch.manual_seed(20)
rows = []


@contextlib.contextmanager
def case(what, name):
    """A row: what is noted while it runs, or the failed check."""
    notes = []
    try:
        yield notes.append
        outcome = "passed"
    except Exception as error:
        outcome = "FAILED"
        notes = [f"{type(error).__name__}: {error}"]
    rows.append((what, name, outcome, "; ".join(notes)))
    print(" | ".join(rows[-1]), flush=True)


def check(condition, message):
    if not condition:
        raise AssertionError(message)


def rewrite(source, name, *options):
    """Has the library read `source` and write it anew."""
    target = WORK / "out" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([args.rewrite, source, target, *map(str, options)], capture_output=True, text=True)
    check(done.returncode == 0, done.stderr)
    return target


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def same_file(a, b):
    check(a.read_bytes() == b.read_bytes(), f"{b} has other bytes than {a}")


# 4-bit models


def decode(weight, dtype=None):
    """A 4-bit weight, by bitsandbytes' backend in torch: its compiled CPU kernel is wrong where a block spans rows."""
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = weight.data.view(torch.uint8).reshape(-1)
    return _dequantize_4bit_compute(packed, absmax.float(), state.code, state.blocksize, state.shape, dtype or state.dtype)


def load_model(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    for kind in ["missing_keys", "unexpected_keys", "mismatched_keys"]:
        check(not info[kind], f"{kind}: {info[kind]}")
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # it would repack the weight, and round its scales to bf16
    return model.eval()


def weights(model):
    """Every parameter; those in 4 bits decoded."""
    return {
        name: decode(p) if isinstance(p, bnb.nn.Params4bit) else p.data for name, p in model.named_parameters()
    }


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids).logits


def check_same(a, b):
    check(a.keys() == b.keys(), f"other parameters: {a.keys() ^ b.keys()}")
    for name in a:
        check(same_bits(a[name], b[name]), f"{name} differs")


def in_4_bits(model):
    return [p for p in model.parameters() if isinstance(p, bnb.nn.Params4bit)]


def check_hf_folders():
    for name in ["hf_dq_bf16", "hf_dq_bf16_storage_bf16", "hf_nodq_f16"]:
        source = DATA / "nf4_checkpoint" / name
        io = load_file(source.with_name(f"{name}.io.safetensors"))
        with case("the same file", name):
            same_file(source / "model.safetensors", rewrite(source, name) / "model.safetensors")
        theirs = load_model(source)
        their_weights = weights(theirs)  # before the forward pass, which casts biases
        their_logits = logits(theirs, io["input_ids"])
        off = (their_logits.float() - io["logits"].float()).abs().max().item()
        for storage in STORAGE:
            for shard in [None, 60_000]:
                label = f"{name}, {storage}" + (", sharded" if shard else "")
                with case("loaded by transformers", label) as note:
                    options = ["--storage", storage] + (["--shard-bytes", shard] if shard else [])
                    ours = load_model(rewrite(source, label.replace(", ", "-"), *options))
                    check_same(weights(ours), their_weights)
                    check(len(in_4_bits(ours)) == 14, f"{len(in_4_bits(ours))} weights in 4 bits")
                    dtype = in_4_bits(ours)[0].dtype
                    check(str(dtype) == f"torch.{storage}", f"stored as {dtype}")
                    check(same_bits(logits(ours, io["input_ids"]), their_logits), "the logits differ")
                    note(f"14 of {len(their_weights)} parameters in 4 bits, all bits and the logits equal")
                    note(f"{off:.2g} off the stored logits, which another backend computed")


def bare_models():
    """State dicts of bare Linear4bit modules, of every kind."""
    for quant_type in ["nf4", "fp4"]:
        for nested in [False, True]:
            for storage in STORAGE:
                module = torch.nn.ModuleDict()
                for i, (blocksize, dtype) in enumerate([(32, torch.float32), (64, torch.bfloat16), (4096, torch.float16)]):
                    linear = torch.nn.Linear(100, 40, bias=i == 1, dtype=dtype)
                    quantised = bnb.nn.Linear4bit(100, 40, bias=i == 1)
                    quantised.weight = bnb.nn.Params4bit(
                        linear.weight.data, requires_grad=False, blocksize=blocksize, compress_statistics=nested,
                        quant_type=quant_type, quant_storage=getattr(torch, storage),
                    ).to("cpu")
                    if i == 1:
                        quantised.bias = linear.bias
                    module[f"m{i}"] = quantised
                    check(quantised.weight.quant_state is not None, "not quantised")
                yield f"{quant_type}{', nested' if nested else ''}, {storage}", module


def check_bare_files():
    with case("the same file", "bare.safetensors"):
        source = DATA / "nf4_checkpoint/bare.safetensors"
        same_file(source, rewrite(source, "bare.safetensors"))
    for name, module in bare_models():
        with case("the same file", f"bitsandbytes state dict, {name}") as note:
            source = WORK / "in" / f"{name.replace(', ', '-')}.safetensors"
            source.parent.mkdir(parents=True, exist_ok=True)
            save_file(module.state_dict(), source, metadata={"format": "pt"})
            target = rewrite(source, source.name)
            same_file(source, target)
            dense = load_file(rewrite(source, f"dense-{source.name}", "--dequantize"))
            for layer, linear in module.items():
                check(same_bits(dense[f"{layer}.weight"], decode(linear.weight)), f"{layer} decodes to other bits")
            note("decoded to the same bits")


def check_quantised_models():
    """Models that the library has quantised."""
    for quant_type in ["nf4", "fp4"]:
        for nested in [False, True]:
            options = ["--quantize", quant_type, "--blocksize", 32] + (["--nested"] if nested else [])
            label = f"llama, {quant_type}{', nested' if nested else ''}"
            with case("quantised by us", label) as note:
                folder = rewrite(DATA / "peft/llama/base", label.replace(", ", "-"), *options)
                dense = rewrite(folder, f"{folder.name}-dense", "--dequantize")
                ours, decoded = load_model(folder), load_model(dense)
                check_same(weights(ours), weights(decoded))
                quantised = len(in_4_bits(ours))
                check(quantised == 14, f"{quantised} weights in 4 bits")
                input_ids = torch.arange(20).reshape(2, 10)
                off = (logits(ours, input_ids) - logits(decoded, input_ids)).abs().max().item()
                # The same products of the same f32 weights: only the order of a sum may differ.
                check(off < 1e-5, f"logits are {off:.2g} off those of the decoded model")
                note(f"{quantised} weights decode to our bits; logits {off:.2g} off those of the decoded model")


# Adapters


def load_adapter(base, folder):
    """The base with an adapter, refusing what PEFT only warns of."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    for warning in raised:
        text = str(warning.message)
        check("missing" not in text and "nexpected" not in text, text)
    return model.eval()


def state_dict(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ranks 0 and of biases, which it takes for mistakes
        return get_peft_model_state_dict(model)


def check_adapter(what, name, base, source, stored=None):
    with case(what, name) as note:
        target = rewrite(source, f"adapters/{name.replace('/', '-').replace(', ', '-')}")
        same_file(source / "adapter_model.safetensors", target / "adapter_model.safetensors")
        a, b = (json.loads((folder / "adapter_config.json").read_text()) for folder in [source, target])
        check(all(b[key] == a[key] for key in a), "another configuration")
        theirs, ours = load_adapter(base, source), load_adapter(base, target)
        a, b = (state_dict(model) for model in [theirs, ours])
        check_same(a, b)
        check(a.keys() == load_file(target / "adapter_model.safetensors").keys(), "PEFT has not taken every tensor")
        input_ids = torch.arange(20).reshape(2, 10) if stored is None else stored["input_ids"]
        y = logits(ours, input_ids)
        check(same_bits(y, logits(theirs, input_ids)), "the logits differ")
        moved = (y - logits(base, input_ids)).abs().max().item()
        check(moved > 1e-3, "the adapter does nothing")
        note(f"{len(a)} tensors and the logits equal")
        if stored is not None and "logits_adapted" in stored:
            off = (y - stored["logits_adapted"]).abs().max().item()
            check(off < 1e-4, f"logits are {off:.2g} off the stored ones")
            note(f"{off:.2g} off the stored logits (the adapter moves them by {moved:.2g})")


def check_stored_adapters(bases):
    for folder in sorted((DATA / "peft").glob("*/*/adapter_config.json")):
        model, name = folder.parts[-3], folder.parts[-2]
        check_adapter("loaded by PEFT", f"{model}/{name}", bases[model], folder.parent, load_file(folder.parent / "io.safetensors"))


KINDS = {
    "lora": dict(),
    "lora, bf16": dict(),
    "lora, f16": dict(),
    "rslora with patterns": dict(use_rslora=True, rank_pattern={r"layers\.1\..*": 7, "q_proj": 2}, alpha_pattern={r"^model.*\.v_proj": 3}),
    "dora": dict(use_dora=True),
    "dora, bf16": dict(use_dora=True),
    "lora_bias": dict(lora_bias=True),
    "bias all": dict(bias="all"),
    "bias lora_only": dict(bias="lora_only"),
    "one layer": dict(layers_to_transform=[1], layers_pattern="layers"),
    "expression": dict(target_modules=r".*\.(q|up)_proj"),
    "excluded": dict(target_modules="all-linear", exclude_modules=["k_proj"]),
    "embedding and saved modules": dict(target_modules=["embed_tokens", "v_proj"], modules_to_save=["lm_head", "norm"]),
    "lm_head": dict(target_modules=["lm_head", "v_proj"]),
    "eva": dict(init_lora_weights="eva"),
    "adalora": dict(init_r=5, total_step=10),
}


def made_by_peft(name, base):
    """An adapter of this kind, with random parameters, as PEFT saves it."""
    options = dict(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]) | KINDS[name]
    if name == "adalora":
        options.pop("r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = (AdaLoraConfig if name == "adalora" else LoraConfig)(task_type="CAUSAL_LM", **options)
        model = get_peft_model(copy.deepcopy(base), config)
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
            if "lora_" in key and name.endswith("16"):
                parameter.data = parameter.data.to(torch.bfloat16 if "bf16" in name else torch.float16)
        folder = WORK / "in" / name.replace(", ", "-").replace(" ", "-")
        model.save_pretrained(folder)
    return folder


def check_fresh_adapters(base):
    for name in KINDS:
        check_adapter("made and loaded by PEFT", name, base, made_by_peft(name, base))
    # A configuration with nothing but what `Config::lora` writes.
    folder = made_by_peft("lora", base)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: config[key] for key in ["peft_type", "r", "lora_alpha", "target_modules"]}))
    check_adapter("made and loaded by PEFT", "shortest configuration", base, folder)


def main():
    shutil.rmtree(WORK, ignore_errors=True)
    check_hf_folders()
    check_bare_files()
    check_quantised_models()
    bases = {name: load_model(DATA / "peft" / name / "base") for name in ["llama", "llama_bias", "gpt2"]}
    check_stored_adapters(bases)
    check_fresh_adapters(bases["llama_bias"])
    failed = sum(outcome == "FAILED" for _, _, outcome, _ in rows)
    summary = f"{len(rows) - failed} passed, {failed} failed"
    print(summary)
    if args.result:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
        lines = [
            "# Result of tests/interop/run", "",
            f"{datetime.date.today()}, Python {platform.python_version()}, {versions}, {platform.machine()} CPU. {summary}.", "",
            "| what | case | | |", "|---|---|---|---|",
            *("| " + " | ".join(row) + " |" for row in rows),
        ]
        args.result.write_text("\n".join(lines) + "\n")
    sys.exit(1 if failed else 0)


main()
