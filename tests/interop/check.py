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
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

parser = argparse.ArgumentParser()
parser.add_argument("--rewrite", required=True, type=pathlib.Path, help="the built example")
parser.add_argument("--command", required=True, type=pathlib.Path, help="the built command")
parser.add_argument("--train", required=True, type=pathlib.Path, help="the built example that goes on training")
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


# Whole models, by the command


def command(*arguments, out):
    """Runs the command; its output is a folder of that name."""
    target = WORK / "models" / out
    target.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([args.command, *map(str, arguments), "--out", target, "--force"], capture_output=True, text=True)
    check(done.returncode == 0, done.stderr)
    return target


INPUT_IDS = torch.arange(20).reshape(2, 10)


def in_bf16(name):
    """A stored model, its weights in bf16."""
    folder = WORK / "in" / f"{name}-bf16"
    model = AutoModelForCausalLM.from_pretrained(DATA / "peft" / name / "base", dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def fp4_ties(source, ours, theirs):
    """Counts elements with other values. bitsandbytes' CPU code has other FP4 thresholds than its CUDA kernel, whose literals have six
    digits and which we follow: only elements that lie between the two may differ."""
    dense, theirs, count = dict(load_model(source).named_parameters()), dict(theirs.named_parameters()), 0
    for name, p in ours.named_parameters():
        if isinstance(p, bnb.nn.Params4bit):
            x, a, b = dense[name].data.float(), decode(p, torch.float32), decode(theirs[name], torch.float32)
            absmax = x.view(-1, 64).abs().amax(1, keepdim=True).expand(-1, 64).reshape(x.shape)
            other = a != b
            count += other.sum().item()
            check((((a + b) / 2 - x).abs() <= 1e-6 * absmax)[other].all(), f"{name} differs")
        else:
            check(same_bits(p.data, theirs[name].data), f"{name} differs")
    return count


def check_quantize():
    for name in ["llama", "llama_bias"]:
        source = in_bf16(name)
        for quant_type in ["nf4", "fp4"]:
            with case("quantize", f"{name}, {quant_type}") as note:
                config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch.bfloat16)
                theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu", dtype="auto")
                for module in theirs.modules():
                    if isinstance(module, bnb.nn.Linear4bit):
                        module.support_avx512bf16_for_cpu = False
                ours = load_model(command("quantize", source, "--quant-type", quant_type, out=f"{name}-{quant_type}"))
                check(len(in_4_bits(ours)) == 14, f"{len(in_4_bits(ours))} weights in 4 bits")
                if quant_type == "fp4":
                    note(f"the weights that transformers quantises by itself but for {fp4_ties(source, ours, theirs)} on thresholds")
                else:
                    check_same(weights(ours), weights(theirs.eval()))
                    check(same_bits(logits(ours, INPUT_IDS), logits(theirs, INPUT_IDS)), "the logits differ")
                    note("the weights that transformers quantises by itself, their bits and the logits")
            for storage in STORAGE:
                with case("quantize, dequantize", f"{name}, {quant_type}, nested, {storage}") as note:
                    four = command("quantize", source, "--quant-type", quant_type, "--double-quant", "--storage", storage, out=f"{name}-{quant_type}-{storage}")
                    dense = command("dequantize", four, "--dtype", "f32", out="dense")
                    ours, decoded = load_model(four), load_model(dense)
                    a, b = weights(ours), weights(decoded)
                    fours = [n for n, p in ours.named_parameters() if isinstance(p, bnb.nn.Params4bit)]
                    for weight in fours:
                        exact = decode(dict(ours.named_parameters())[weight], torch.float32)
                        check(same_bits(exact, b[weight]), f"{weight} decodes to other bits")
                    check(len(fours) == 14 and a.keys() == b.keys(), "other parameters")
                    note("14 weights decode to the bits that we decode")
        with case("quantize", f"{name}, some modules skipped") as note:
            ours = load_model(command("quantize", source, "--skip", "v_proj", "--skip", "model.layers.1.mlp", out="skipped"))
            kept = [n for n, p in ours.named_parameters() if not isinstance(p, bnb.nn.Params4bit) and n.endswith("_proj.weight")]
            check(len(in_4_bits(ours)) == 9 and len(kept) == 5, f"{len(in_4_bits(ours))} weights in 4 bits, {kept} kept")
            note("9 of 14 weights in 4 bits, as llm_int8_skip_modules says")


def factors(layer):
    """|B| |A| times the scaling, of the adapted weight's shape, and the rank."""
    with torch.no_grad():
        if "default" in getattr(layer, "lora_embedding_A", {}):
            a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            return (b.abs() @ a.abs()).T * layer.scaling["default"], a.shape[0]
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        a, b = getattr(a, "weight", a), getattr(b, "weight", b)
        scaling = layer.scaling["default"]
        if hasattr(layer, "lora_E"):
            a, scaling = a * layer.lora_E["default"], scaling / (layer.ranknum["default"] + 1e-5)
        product = b.abs() @ a.abs() * scaling
        return product.T if layer.fan_in_fan_out else product, a.shape[0]


def check_merge(base, name, folder):
    with case("merge", name) as note:
        source = DATA / "peft" / name.split("/")[0] / "base"
        ours = load_model(command("merge", source, folder, out="merged"))
        theirs = load_adapter(base, folder)
        adapted = logits(theirs, INPUT_IDS)
        # f32 sums of rank terms, the base and (of DoRA) the squares of a row, there and here.
        bounds = {}
        for module, layer in theirs.base_model.model.named_modules():
            if hasattr(layer, "lora_A") and (layer.lora_A or getattr(layer, "lora_embedding_A", {})):
                product, rank = factors(layer)
                weight = layer.get_base_layer().weight.data.abs()
                growth = 1.0
                if getattr(layer, "use_dora", {}).get("default"):
                    magnitude = layer.lora_magnitude_vector["default"].weight.data
                    merged = copy.deepcopy(layer)
                    merged.merge()
                    growth = (merged.get_base_layer().weight.data.abs() / (layer.get_base_layer().weight.data + layer.get_delta_weight("default")).abs()).nan_to_num(1.0).max().item()
                    check(magnitude.isfinite().all(), "a magnitude that is not finite")
                terms = rank + 4 + (max(weight.shape) if growth != 1.0 else 0)
                bounds[f"{module}.weight"] = 2 * terms * 2**-24 * growth * (weight + product)
        merged = dict(theirs.merge_and_unload().named_parameters())
        got = dict(ours.named_parameters())
        check(got.keys() == merged.keys(), f"other parameters: {got.keys() ^ merged.keys()}")
        worst = 0.0
        for key, wanted in merged.items():
            off = (got[key].data - wanted.data).abs()
            if key in bounds:
                check((off <= bounds[key]).all(), f"{key} is off by {off.max():.2g}")
                worst = max(worst, off.max().item())
            elif key.endswith(".bias"):
                check((off <= 2**-23 * wanted.data.abs()).all(), f"{key} is off by {off.max():.2g}")
            else:
                check(same_bits(got[key].data, wanted.data), f"{key} differs")
        off = (logits(ours, INPUT_IDS) - adapted).abs().max().item()
        check(off < 1e-4, f"logits are {off:.2g} off those of the unmerged adapter")
        note(f"{len(bounds)} weights within {worst:.2g} of PEFT's; logits {off:.2g} off those of the unmerged adapter")


def check_merge_four_bits():
    folder = DATA / "peft/llama/lora_r8a16"
    for options in [[], ["--scale", "least-error", "--rounding", "keep-gain"]]:
        with case("merge in 4 bits", " ".join(options) or "as PEFT does") as note:
            four = command("quantize", DATA / "peft/llama/base", "--double-quant", out="four")
            undo = WORK / "models/undo"
            merged = command("merge", four, folder, "--undo", undo, *options, out="four-merged")
            ours, decoded = load_model(merged), load_model(command("dequantize", merged, out="four-decoded"))
            check_same(weights(ours), weights(decoded))
            off = (logits(ours, INPUT_IDS) - logits(decoded, INPUT_IDS)).abs().max().item()
            # The same products of the same f32 weights: only the order of a sum may differ.
            check(off < 1e-5, f"logits are {off:.2g} off those of the decoded model")
            again = command("unmerge", merged, folder, "--undo", undo, out="four-again")
            check_same(load_file(again / "model.safetensors"), load_file(four / "model.safetensors"))
            note(f"14 weights decode to our bits; logits {off:.2g} off those of the decoded model; unmerged to the bit")


def check_training():
    """An adapter that PEFT has begun and we have gone on with, in one piece and in two, on the model of examples/data/make.py."""
    sys.path.insert(0, str(DATA.parents[1] / "examples" / "data"))
    from make import OneLayer, decoded, layer

    with case("trained by us, loaded by PEFT", "minilm_lora") as note:
        folders = WORK / "out" / "training", WORK / "out" / "training-resumed"
        for folder, runs in zip(folders, [[["--steps", "300"]], [["--steps", "120"], ["--steps", "180", "--resume"]]]):
            for options in runs:
                done = subprocess.run([args.train, "--out", folder, *options], capture_output=True, text=True)
                check(done.returncode == 0, done.stderr)
        for name in ["adapter_model.safetensors", "training_state.safetensors", "loss.csv"]:
            same_file(folders[0] / name, folders[1] / name)
        data = layer()
        model = load_adapter(OneLayer(decoded(), data["bias"]), folders[0])
        stored = load_file(folders[0] / "adapter_model.safetensors")
        check(state_dict(model).keys() == stored.keys(), "PEFT has not taken every tensor")
        with torch.no_grad():
            y = model(data["x"])
        off = (y - load_file(folders[0] / "outputs.safetensors")["y"]).abs().max().item()
        # The same f32 products in another order: sums of 384 terms below 10.
        check(off < 1e-4, f"the outputs are {off:.2g} off")
        loss = torch.nn.functional.mse_loss(y, data["x"] @ data["weight"].T + data["bias"]).item()
        note(f"resumed = uninterrupted, to the byte; outputs {off:.2g} off ours, mean squared error {loss:.2g}")


def kept(base, tuned, adapted):
    """For each weight that differs, the share of the squared difference that PEFT's merge of the adapter keeps."""
    shares = {}
    for name, old in base.named_parameters():
        change = (tuned[name] - old).double()
        if change.abs().max() > 0:
            rest = (tuned[name] - adapted[name]).double()
            shares[name] = 1 - (rest.norm() / change.norm()).item() ** 2
    return shares


def check_extracted(bases):
    """Adapters that `lora-kernels extract` makes of two models, as PEFT loads and merges them."""
    cases = [
        ("llama", "lora_r8a16", ["--rank", "8"], 1 - 1e-6),
        ("llama", "lora_r8a16", ["--energy", "0.7", "--dtype", "bf16"], 0.7 - 1e-3),
        ("llama", "lora_r8a16", ["--budget", "25kB"], None),
        ("llama", "lora_r8a16", ["--rank", "8", "--skip", "model.layers.0", "--save-others"], 1 - 1e-6),
        ("gpt2", "lora_fifo", ["--rank", "8"], 1 - 1e-6),
        ("llama", None, ["--rank", "64", "--save-others"], 1 - 1e-6),
    ]
    for model, adapter, options, least in cases:
        label = f"{model}, {adapter or 'all parameters changed'}, {' '.join(options)}"
        with case("extracted by us, loaded by PEFT", label) as note:
            base, source = bases[model], DATA / "peft" / model
            if adapter:
                tuned = load_adapter(base, source / adapter).merge_and_unload()
            else:
                tuned = copy.deepcopy(base)
                for parameter in tuned.parameters():
                    parameter.data += 0.02 * torch.randn_like(parameter)
            folder = WORK / "in" / "tuned"
            shutil.rmtree(folder, ignore_errors=True)
            tuned.save_pretrained(folder)
            target = WORK / "out" / "extracted"
            shutil.rmtree(target, ignore_errors=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            command = [args.command, "extract", source / "base", folder, "--out", target, "--json", *options]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            check(done.returncode == 0, done.stderr)
            said = json.loads(done.stdout)
            loaded = load_adapter(base, target)
            # PEFT's own would also have the table of an adapted lm_head.
            check(load_file(target / "adapter_model.safetensors").keys() <= state_dict(loaded).keys(), "PEFT has not taken every tensor")
            input_ids = torch.arange(20).reshape(2, 10)
            want, got = logits(tuned, input_ids), logits(loaded, input_ids)
            merged = dict(loaded.merge_and_unload().named_parameters())
            shares = kept(base, dict(tuned.named_parameters()), merged)
            check(least is None or min(shares.values()) >= least, f"of some weight {min(shares.values())} is kept")
            for layer in said["layers"]:
                share = shares[layer["module"] + ".weight"]
                check(abs(share - layer["energy"]) < 1e-5, f"{layer['module']}: {share} is kept, not {layer['energy']}")
            off = (got - want).abs().max().item()
            moved = (want - logits(base, input_ids)).abs().max().item()
            note(f"ranks {min(x['rank'] for x in said['layers'])} to {max(x['rank'] for x in said['layers'])} of {len(said['layers'])} weights")
            note("PEFT keeps of each what we say")
            if least == 1 - 1e-6:
                check(off < 1e-4, f"logits are {off:.2g} off those of the tuned model")
                note(f"logits {off:.2g} off those of the tuned model, which moved by {moved:.2g}")


def check_initial():
    """4-bit bases and adapters that `lora-kernels pissa` and `loftq` make, as PEFT and bitsandbytes load them."""
    source = DATA / "peft/llama/base"
    dense = load_model(source)
    plain = weights(load_model(command("quantize", source, "--double-quant", out="plain")))
    for kind, options in [("pissa", []), ("loftq", ["--iterations", "3"])]:
        with case("4-bit base and initial adapter, loaded by PEFT", kind) as note:
            folder = command(kind, source, "--rank", 16, "--double-quant", *options, out=kind)
            four = load_model(folder)
            loaded = PeftModel.from_pretrained(four, folder, subfolder=f"{kind}_init", is_trainable=True).eval()
            layers = [(n, m) for n, m in loaded.base_model.model.named_modules() if hasattr(m, "get_delta_weight") and m.lora_A]
            check(len(layers) == len(in_4_bits(four)) == 14, f"{len(layers)} adapted layers")
            shares = []
            for name, layer in layers:
                check(layer.lora_A["default"].weight.requires_grad, f"{name} is not trained")
                wanted = dense.get_submodule(name).weight.data.double()
                delta = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).data.double() * layer.scaling["default"]
                rest = wanted - decode(layer.get_base_layer().weight, torch.float32).double() - delta
                shares.append((rest.norm() / (wanted - plain[f"{name}.weight"].double()).norm()).item())
            check(max(shares) < 1, f"with the adapter {max(shares)} of the error of 4 bits is left")
            merged = load_model(command("merge", folder, folder / f"{kind}_init", "--dtype", "f32", out=f"{kind}-merged"))
            off = (logits(loaded, INPUT_IDS) - logits(merged, INPUT_IDS)).abs().max().item()
            check(off < 1e-4, f"logits are {off:.2g} off those of the merged model")
            note(f"of the error of plain 4 bits {min(shares):.2f} to {max(shares):.2f} are left; logits {off:.2g} off those of our merged model")


def check_reduced(bases):
    """Adapters that `lora-kernels reduce` has brought to smaller ranks, as PEFT loads them."""
    for name in ["llama/lora_r8a16", "llama/dora_r8", "llama/adalora_pruned", "gpt2/lora_fifo"]:
        with case("reduced by us, loaded by PEFT", name) as note:
            base = bases[name.split("/")[0]]
            target = command("reduce", DATA / "peft" / name, "--rank", 3, out="reduced")
            before, after = load_adapter(base, DATA / "peft" / name), load_adapter(base, target)
            check(load_file(target / "adapter_model.safetensors").keys() <= state_dict(after).keys(), "PEFT has not taken every tensor")
            worst, count = 0.0, 0
            for module, layer in before.base_model.model.named_modules():
                if not (hasattr(layer, "get_delta_weight") and layer.lora_A):
                    continue
                old = layer.get_delta_weight("default").data.double()
                new = after.base_model.model.get_submodule(module).get_delta_weight("default").data.double()
                left, sigma, right = torch.linalg.svd(old, full_matrices=False)
                best = left[:, :3] * sigma[:3] @ right[:3]
                worst, count = max(worst, ((new - best).norm() / old.norm()).item()), count + 1
            # PEFT forms both deltas in f32, and a factor of ours is rounded to it.
            check(count > 0 and worst < 1e-5, f"a delta is {worst:.2g} off the nearest of its rank")
            note(f"{count} deltas within {worst:.2g} of the nearest of rank 3 by torch")


def main():
    shutil.rmtree(WORK, ignore_errors=True)
    check_hf_folders()
    check_bare_files()
    check_quantised_models()
    bases = {name: load_model(DATA / "peft" / name / "base") for name in ["llama", "llama_bias", "gpt2"]}
    check_stored_adapters(bases)
    check_fresh_adapters(bases["llama_bias"])
    check_quantize()
    for folder in sorted((DATA / "peft").glob("*/*/adapter_config.json")):
        model, name = folder.parts[-3], folder.parts[-2]
        check_merge(bases[model], f"{model}/{name}", folder.parent)
    check_merge_four_bits()
    check_training()
    check_extracted(bases)
    check_initial()
    check_reduced(bases)
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
