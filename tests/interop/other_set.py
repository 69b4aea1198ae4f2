"""Another set of reference data for `lora-kernels verify`, laid out as tests/data/README.md says: other numbers, shapes, block sizes,
ranks and kinds of adapters, chosen by a seed. Made with the real packages on the CPU (requirements.txt).

    python tests/interop/other_set.py SEED FOLDER
    lora-kernels verify FOLDER
    lora-kernels verify FOLDER --device emulator

bitsandbytes' compiled library is kept out, because its CPU kernels are wrong (tests/data/NOTES.md, 2): its backend in torch does the work.
"""

import copy
import ctypes
import hashlib
import json
import logging
import math
import pathlib
import random
import shutil
import sys
import warnings

load_library = ctypes.cdll.LoadLibrary


def load_others(path):
    if "bitsandbytes" in str(path):
        raise OSError("not wanted")
    return load_library(path)


ctypes.cdll.LoadLibrary = load_others
logging.disable(logging.ERROR)
warnings.simplefilter("ignore")

import bitsandbytes as bnb  # noqa: E402
import bitsandbytes.functional as F  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.adalora.layer import SVDLinear  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils import AuxiliaryTrainingWrapper  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

SEED, OUT = int(sys.argv[1]), pathlib.Path(sys.argv[2])
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
BLOCKSIZES = [32 << i for i in range(8)]
NF4, DYNAMIC = F.get_4bit_type("nf4", device="cpu"), F.create_dynamic_map()
THRESHOLDS = (NF4[1:] + NF4[:-1]) / 2
choose = random.Random(SEED)


def put(name, tensors, sidecar):
    path = OUT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: t.detach().contiguous().clone() for key, t in tensors.items()}, path.with_name(f"{path.name}.safetensors"))
    path.with_name(f"{path.name}.json").write_text(json.dumps(sidecar, indent=1))


def sha256(tensor):
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


# 4 bits


def decode(packed, absmax, blocksize, shape, dtype=F32):
    codes = torch.stack([packed.view(torch.uint8).reshape(-1) >> 4, packed.view(torch.uint8).reshape(-1) & 15], 1).reshape(-1)
    count = math.prod(shape)
    return (NF4[codes[:count].long()] * absmax.repeat_interleave(blocksize)[:count]).to(dtype).reshape(shape)


def scales(state):
    """The scales of a quant_state, in f32."""
    return (F.dequantize_blockwise(state.absmax, state.state2) + state.offset).float() if state.nested else state.absmax


def quantise_scales(absmax, prefix):
    offset = absmax.mean()
    codes, state = F.quantize_blockwise(absmax - offset, code=DYNAMIC, blocksize=256)
    restored = F.dequantize_blockwise(codes, state) + offset
    return {f"{prefix}qabsmax": codes, f"{prefix}nested_absmax": state.absmax, f"{prefix}offset": offset.reshape(1), f"{prefix}absmax_dequant": restored}


def ambiguous(values, blocksize, absmax):
    """Elements whose code depends on how the quotient by the scale is rounded."""
    found = []
    for block, scale in enumerate(absmax.clamp(min=1e-38).numpy()):
        x = values[block * blocksize :][:blocksize].numpy()
        with np.errstate(all="ignore"):
            reciprocal = np.float32(1) / scale
            ways = [x * reciprocal, x / scale, x * np.nextafter(reciprocal, np.float32(np.inf)), x * np.nextafter(reciprocal, np.float32(0))]
        codes = [(np.clip(way, -1, 1)[:, None] > THRESHOLDS.numpy()).sum(1) for way in ways]
        found += (block * blocksize + np.nonzero(np.ptp(codes, axis=0))[0]).tolist()
    return found


def block_case(tensors, name, values, blocksize, dtype, informational=None, nested=True):
    values = values.to(DTYPES[dtype])
    packed, state = F.quantize_4bit(values, blocksize=blocksize, quant_type="nf4")
    shape, absmax = values.shape, state.absmax
    unclear = ambiguous(values.reshape(-1).float(), blocksize, absmax)
    case = {"name": name, "dtype": dtype, "shape": list(shape), "blocksize": blocksize, "blocks": len(absmax), "ambiguous": len(unclear)}
    own = {"input": values, "packed": packed, "absmax": absmax, "dequant": F.dequantize_4bit(packed, state).reshape(shape)}
    if unclear:
        own["ambiguous_idx"] = torch.tensor(unclear)
    if informational is not None:
        case["informational_blocks"] = informational
    if dtype == "f32":
        own |= {f"dequant_{other}": decode(packed, absmax, blocksize, shape, DTYPES[other]) for other in ["bf16", "f16"]}
    if nested:
        own |= quantise_scales(absmax, "dq.")
        decoded = decode(packed, own["dq.absmax_dequant"], blocksize, shape, values.dtype)
        if choose.random() < 0.5:
            own["dq.dequant"] = decoded
        else:
            case["dq.dequant_sha256"] = sha256(decoded)
    tensors |= {f"{name}.{key}": t for key, t in own.items()}
    return case


def special_rows(blocksize, dtype):
    """Blocks that are one of a kind, and which of them backends treat differently."""
    limits = torch.finfo(DTYPES[dtype])
    around = torch.cat([torch.ones(1), THRESHOLDS, -THRESHOLDS, torch.nextafter(THRESHOLDS, torch.tensor(9.0)), torch.nextafter(THRESHOLDS, torch.tensor(-9.0))])
    noise = torch.randn(blocksize, dtype=F64)
    noise /= noise.abs().max()
    wide = dtype != "f16"  # whose smallest and largest numbers are those of f32
    rows = [
        ([0.0], True),
        ([-0.0], True),
        ([0.0, -0.0], True),
        ([0.7], False),
        ([-0.7, 0.7], False),
        ([0.0] * (blocksize - 1) + [-0.5], False),
        *((NF4 * scale, False) for scale in [1, 0.37, -1, 2**-9, 0.3, 0.0123]),
        *((around * scale, False) for scale in [1, 0.5, 2**-9, 0.3, 0.0123]),
        (torch.cat([torch.tensor([40.0]), noise[1:]]), False),
        (noise * limits.max, wide),
        (noise * limits.tiny * 16, wide),
        (noise * limits.tiny * 0.9, wide),
        ((noise * 3).round() * limits.tiny * limits.eps, True),
    ]
    values = [torch.as_tensor(row, dtype=F64) for row, _ in rows]
    values = [row.repeat(-(-blocksize // len(row)))[:blocksize].to(DTYPES[dtype]) for row in values]
    return torch.stack(values), [i for i, (_, differs) in enumerate(rows) if differs]


def nf4_blockwise():
    midpoints = (DYNAMIC[1:] + DYNAMIC[:-1]) / 2
    codebooks = {"nf4_code": NF4, "nf4_thresholds": THRESHOLDS, "dynamic_map_256": DYNAMIC, "dynamic_thresholds_255": midpoints}
    put("nf4_blockwise/codebooks", codebooks, {})
    tensors, cases = {}, []
    for dtype in DTYPES:
        for blocksize in BLOCKSIZES:
            columns = choose.choice([64, 128, 192, 256])
            values = torch.randn(-(-blocksize // columns) * choose.randint(2, 12), columns) * 10 ** choose.uniform(-4, 2)
            cases.append(block_case(tensors, f"plain_{dtype}_{blocksize}", values, blocksize, dtype))
        heavy = torch.distributions.StudentT(1.5).sample((33, 64))
        cases.append(block_case(tensors, f"heavy_{dtype}", heavy, choose.choice(BLOCKSIZES), dtype))
    put("nf4_blockwise/plain", tensors, {"cases": cases})
    tensors, cases = {}, []
    for i in range(24):
        dimensions = choose.randint(1, 4)
        shape = [choose.randint(1, [3000, 50, 13, 7][dimensions - 1]) for _ in range(dimensions)]
        for dtype in choose.sample(list(DTYPES), 2):
            cases.append(block_case(tensors, f"shape{i}_{dtype}", torch.randn(shape), choose.choice(BLOCKSIZES), dtype))
    for count in [1, 2, 3, 63, 64, 65, 4095, 4097]:
        cases.append(block_case(tensors, f"count{count}", torch.randn(count), choose.choice(BLOCKSIZES), choose.choice(list(DTYPES))))
    for i, (tail, differs) in enumerate([([0.0] * 7, True), ([1e-30] * 3, False), ([-0.7] * 9, False), ([1e-40] * 6, True)]):
        values = torch.cat([torch.randn(64), torch.tensor(tail)])
        cases.append(block_case(tensors, f"tail{i}", values, 64, "f32", [1] if differs else []))
    put("nf4_blockwise/ragged", tensors, {"cases": cases})
    tensors, cases = {}, []
    for dtype in DTYPES:
        for blocksize in [32, 64, 256]:
            values, differ = special_rows(blocksize, dtype)
            cases.append(block_case(tensors, f"special_{dtype}_{blocksize}", values, blocksize, dtype, differ, nested=False))
    put("nf4_blockwise/special", tensors, {"cases": cases})
    tensors, cases = {}, []
    for i, blocks in enumerate([1, 2, 255, 256, 257, 513]):
        blocksize = choose.choice([32, 64])
        count = (blocks - 1) * blocksize + choose.randint(1, blocksize)
        values = torch.randn(count) * torch.exp(torch.randn(count) * choose.choice([0, 0.5, 2]))
        cases.append(block_case(tensors, f"nested{i}", values, blocksize, choose.choice(list(DTYPES))))
    cases.append(block_case(tensors, "constant", torch.full((300, 32), -0.3), 32, "bf16"))
    put("nf4_blockwise/double_quant", tensors, {"cases": cases})


def linear(weight, bias, blocksize, nested, storage=torch.uint8):
    n, k = weight.shape
    layer = bnb.nn.Linear4bit(k, n, bias=bias is not None, compute_dtype=F32, compress_statistics=nested, quant_type="nf4", quant_storage=storage)
    options = {"blocksize": blocksize, "compress_statistics": nested, "quant_type": "nf4", "quant_storage": storage, "module": layer}
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, **options)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.clone())
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu")


def layer_weight(layer, dtype=F32):
    state = layer.weight.quant_state
    return decode(layer.weight.data, scales(state), state.blocksize, tuple(state.shape), dtype)


def in_both(call, layer, x):
    """Outputs computed in f32 and in bf16; the latter rounds the bias in place."""
    bias, results = layer.bias, []
    kept = bias.data.clone() if bias is not None else None
    for dtype in [F32, BF16]:
        layer.compute_dtype = dtype
        results.append(call(x.to(dtype)).detach())
        if bias is not None:
            layer.bias.data = kept.clone()
    layer.compute_dtype = F32
    return results


def checkpoint_module(tensors, name, layer, original, whole=True):
    state, compute = layer.weight.quant_state, layer.compute_dtype
    (n, k), bias, x = state.shape, layer.bias, torch.randn(choose.randint(1, 6), state.shape[1])
    y_f32, y_bf16 = in_both(layer, layer, x)
    layer.compute_dtype = compute

    def truth(dtype):
        y = x.to(dtype).double() @ layer_weight(layer, dtype).double().T
        return y if bias is None else y + bias.detach().to(dtype).double()

    own = {"x": x, "y_f32": y_f32, "y_bf16": y_bf16, "y_f64": truth(F32), "y_bf16_truth_f64": truth(BF16)}
    own["original_weight"] = original if whole else original[:2]
    tensors |= {f"{name}.{key}": t for key, t in own.items()}
    hashes = {"dequant_f32": F32, "dequant_bf16": BF16, "dequant_in_quant_state_dtype": state.dtype}
    case = {"name": name, "N": n, "K": k, "T": len(x), "blocksize": state.blocksize, "nested": state.nested, "bias": bias is not None}
    case |= {f"{key}_sha256": sha256(layer_weight(layer, dtype)) for key, dtype in hashes.items()}
    return case | {"quant_state_dtype": str(state.dtype), "packed_dtype": str(layer.weight.data.dtype)}


def nf4_checkpoint():
    folder = OUT / "nf4_checkpoint"
    folder.mkdir(parents=True)
    states, tensors, cases = {}, {}, []
    for i, blocksize in enumerate(BLOCKSIZES):
        n, k = choose.randint(2, 70), choose.randint(2, 75) * 2
        weight = (torch.randn(n, k) * 0.05).to(choose.choice(list(DTYPES.values())))
        bias = torch.randn(n) * 0.1 if choose.random() < 0.5 else None
        layer = linear(weight, bias, blocksize, choose.random() < 0.5)
        states |= {f"layer{i}.{key}": t.contiguous() for key, t in layer.state_dict().items()}
        cases.append(checkpoint_module(tensors, f"layer{i}", layer, weight))
    save_file(states, folder / "bare.safetensors")
    put("nf4_checkpoint/bare.io", tensors, {"cases": cases})
    for dtype, nested, storage, sharded in [
        ("f16", True, "uint8", False),
        ("bf16", False, "float16", True),
        ("f32", True, "float32", True),
        ("bf16", True, "bfloat16", False),
    ]:
        model, original = llama(bias=choose.random() < 0.5), folder / "original"
        model.to(DTYPES[dtype]).save_pretrained(original)
        weights = dict(model.named_parameters())
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": getattr(torch, storage)}
        quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=DTYPES[dtype], **options)
        quantised = LlamaForCausalLM.from_pretrained(original, dtype=DTYPES[dtype], quantization_config=quantisation, device_map={"": "cpu"}).eval()
        shutil.rmtree(original)
        name = f"hf_{'dq' if nested else 'nodq'}_{dtype}_{storage}"
        quantised.save_pretrained(folder / name, **({"max_shard_size": "40KB"} if sharded else {}))
        tensors, cases = {}, []
        for path, layer in quantised.named_modules():
            if isinstance(layer, bnb.nn.Linear4bit) and ".layers.0." in path:
                layer.support_avx512bf16_for_cpu = False
                whole = path.endswith(("q_proj", "down_proj"))
                cases.append(checkpoint_module(tensors, path, layer, weights[f"{path}.weight"], whole))
        put(f"nf4_checkpoint/{name}.io", tensors, {"cases": cases})


# Adapters


def shaken(model, by):
    """Biases and norms that are not what they began as."""
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
        elif "norm" in name or "ln_" in name:
            p.data = 1 + 0.1 * torch.randn_like(p)
        else:
            p.data *= by
    return model.eval()


def llama(bias=False, tied=False):
    config = LlamaConfig(
        hidden_size=choose.choice([32, 48, 64, 80]),
        intermediate_size=choose.choice([72, 90, 104]),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=choose.choice([1, 2, 4]),
        vocab_size=choose.choice([53, 101]),
        max_position_embeddings=64,
        attention_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": choose.choice([1e4, 5e5])},
    )
    return shaken(LlamaForCausalLM(config), 2)


def randomise(model):
    """Adapters that do something."""
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.data *= 1 + 0.2 * torch.randn_like(p)
        elif "lora_" in name:
            p.data = torch.randn_like(p) * (0.3 / math.sqrt(p.shape[-1]) if p.dim() > 1 else 0.1)
        elif "modules_to_save" in name or (name.endswith("bias") and p.requires_grad):
            p.data += 0.1 * torch.randn_like(p)
    return model.eval()


def delta_f64(layer):
    """The delta of the layer's adapter, as its base is stored, and DoRA's factor of every output."""
    if isinstance(layer, SVDLinear):
        a, b, e = (getattr(layer, name)["default"].double() for name in ["lora_A", "lora_B", "lora_E"])
        return b @ (a * e) * layer.scaling["default"] / (layer.ranknum["default"].item() + 1e-5), None
    delta = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * layer.scaling["default"]
    if "default" not in layer.lora_magnitude_vector:
        return delta, None
    weight = layer.base_layer.weight.double()
    norm = torch.linalg.norm((weight.T if layer.fan_in_fan_out else weight) + delta, dim=1)
    return delta, layer.lora_magnitude_vector["default"].weight.double() / norm


def y_f64(layer, x):
    delta, factor = delta_f64(layer)
    weight, bias = layer.base_layer.weight.double(), layer.base_layer.bias
    merged = (weight.T if layer.fan_in_fan_out else weight) + delta
    y = x.double() @ (merged if factor is None else merged * factor[:, None]).T
    lora_bias = None if isinstance(layer, SVDLinear) else layer.lora_B["default"].bias
    for term, scale in [(bias, 1), (lora_bias, layer.scaling["default"])]:
        y = y if term is None else y + term.double() * scale
    return y


def adapted_module(tensors, name, layer, narrow):
    layer = copy.deepcopy(layer)
    embedding = "default" in getattr(layer, "lora_embedding_A", {})
    adalora, weight = isinstance(layer, SVDLinear), layer.base_layer.weight
    x = torch.randint(0, len(weight), (5,)) if embedding else torch.randn(5, layer.in_features)
    own = {"x": x, "y_base": layer.base_layer(x), "y_adapted": layer(x), "delta": layer.get_delta_weight("default")}
    if not embedding:
        own["y_adapted_f64"] = y_f64(layer, x)
    untouched = copy.deepcopy(layer)
    layer.merge()
    own |= {"merged": layer.base_layer.weight.clone(), "y_merged": layer(x)}
    if not embedding and not adalora and layer.lora_B["default"].bias is not None:
        own["merged_bias"] = layer.base_layer.bias.clone()
    layer.unmerge()
    own["unmerged"] = layer.base_layer.weight.clone()
    if narrow and not embedding:
        base_in_bf16, everything = copy.deepcopy(untouched), untouched.to(BF16)
        base_in_bf16.base_layer.to(BF16)
        safe = copy.deepcopy(base_in_bf16)
        own["bf16.y_adapted"] = base_in_bf16(x.to(BF16))
        base_in_bf16.merge()
        own["bf16.merged"] = base_in_bf16.base_layer.weight.clone()
        base_in_bf16.unmerge()
        own["bf16.unmerged"] = base_in_bf16.base_layer.weight.clone()
        if not adalora:
            safe.merge(safe_merge=True)
            own["bf16.merged_safe"] = safe.base_layer.weight
        own["bf16all.y_adapted"] = everything(x.to(BF16))
        everything.merge()
        own["bf16all.merged"] = everything.base_layer.weight
    tensors |= {f"{name}.{key}": t for key, t in own.items()}
    rank = layer.lora_A["default"].shape[0] if adalora else layer.r["default"]
    module = {"module": name, "base_weight_shape": list(weight.shape), "r": rank, "scaling": float(layer.scaling["default"])}
    return module | ({"ranknum": layer.ranknum["default"].item()} if adalora else {})


def adapted_layers(model):
    layers = [(n.removeprefix("base_model.model."), m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    return [(n, m) for n, m in layers if not isinstance(m, AuxiliaryTrainingWrapper)]


@torch.no_grad()
def adapter_folder(folder, model):
    """What PEFT writes, and what it computes."""
    model.save_pretrained(OUT / "peft" / folder)
    layers, ids = adapted_layers(model), torch.randint(0, model.config.vocab_size, (1, 9))
    tensors = {"input_ids": ids, "logits_adapted": model(ids).logits}
    with model.disable_adapter():
        tensors["logits_base"] = model(ids).logits
    modules = [adapted_module(tensors, name, layer, i < 2) for i, (name, layer) in enumerate(layers[:7])]
    model.merge_adapter()
    tensors["logits_merged"] = model(ids).logits
    model.unmerge_adapter()
    put(f"peft/{folder}/io", tensors, {"modules": modules, "adapted_modules": sorted(name for name, _ in layers)})


def peft():
    bases = {"llama": llama(), "llama_bias": llama(bias=True), "llama_tied": llama(tied=True)}
    gpt2 = GPT2Config(n_embd=choose.choice([24, 40, 56]), n_layer=2, n_head=4, vocab_size=71, n_positions=32)
    bases["gpt2"] = shaken(GPT2LMHeadModel(gpt2), 2)
    for name, model in bases.items():
        model.save_pretrained(OUT / "peft" / name / "base")
    patterns = {"rank_pattern": {"q_proj": 3, r"^model\.layers\.1\.self_attn\.v_proj": 2, "layers.0.mlp.down_proj": 17}}
    patterns["alpha_pattern"] = {"o_proj": 5, "q_proj": 32, "layers.0.mlp.down_proj": 1}
    for folder, targets, options in [
        ("llama/lora", "all-linear", {}),
        ("llama/rslora", ["q_proj", "down_proj"], {"use_rslora": True}),
        ("llama/dora", ["q_proj", "v_proj", "down_proj"], {"use_dora": True}),
        ("llama/dora_rslora", ["k_proj", "o_proj"], {"use_dora": True, "use_rslora": True}),
        ("llama/patterns", "all-linear", patterns),
        ("llama/expressions", r".*\.(q|k)_proj", {"rank_pattern": {r".*\.0\..*k_proj": 1}}),
        ("llama/high_rank", ["v_proj"], {"r": 70}),
        ("llama/one_layer", ["q_proj"], {"layers_to_transform": [1]}),
        ("llama/embed_and_head", ["embed_tokens", "q_proj"], {"modules_to_save": ["lm_head"]}),
        ("llama/norm", ["gate_proj"], {"modules_to_save": ["model.norm"]}),
        ("llama/head", ["lm_head", "up_proj"], {}),
        ("llama_tied/embed", ["embed_tokens", "q_proj"], {}),
        ("llama_bias/lora_bias", ["q_proj", "v_proj"], {"lora_bias": True}),
        ("llama_bias/lora_only", ["q_proj", "up_proj"], {"bias": "lora_only"}),
        ("llama_bias/all", ["q_proj"], {"bias": "all"}),
        ("llama_bias/dora", ["up_proj", "v_proj"], {"use_dora": True}),
        ("gpt2/lora", ["c_attn", "c_fc"], {"fan_in_fan_out": True}),
        ("gpt2/dora", ["mlp.c_proj"], {"use_dora": True, "fan_in_fan_out": True}),
        ("gpt2/embed", ["wte", "c_attn"], {"fan_in_fan_out": True}),
    ]:
        options = {"r": choose.choice([1, 2, 3, 5, 8, 12, 20]), "lora_alpha": choose.choice([3, 8, 16])} | options
        config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=targets, **options)
        adapter_folder(folder, randomise(get_peft_model(copy.deepcopy(bases[folder.split("/")[0]]), config)))
    adalora(bases["llama"])
    multi_merge()


def adalora(base):
    """A run with rank allocation, and its adapter with masked and with pruned ranks."""
    init_r, total = choose.choice([5, 8, 12]), choose.choice([11, 14, 17])
    schedule = {"init_r": init_r, "target_r": choose.choice([2, 3]), "tinit": choose.choice([0, 2, 3]), "tfinal": choose.choice([1, 3])}
    schedule |= {"deltaT": choose.choice([1, 2, 3]), "total_step": total, "beta1": choose.choice([0.85, 0.9]), "beta2": 0.85}
    config = AdaLoraConfig(task_type="CAUSAL_LM", lora_alpha=choose.choice([8, 32]), target_modules=["q_proj", "v_proj", "down_proj"], **schedule)
    model = get_peft_model(copy.deepcopy(base), config)
    parameters = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if "lora_" in n}
    optimizer = torch.optim.AdamW(parameters.values(), lr=5e-3)
    allocator, data = model.base_model.rankallocator, torch.randint(0, base.config.vocab_size, (4, 9))
    modules = [n.removesuffix(".lora_A.default") for n in parameters if n.endswith("lora_A.default")]
    ranked, kthvalue = [], torch.kthvalue
    torch.kthvalue = lambda scores, k: ranked.append(scores) or kthvalue(scores, k=k)
    tensors, trace, end = {}, [], total - schedule["tfinal"]
    for step in range(total):
        loss = model(input_ids=data, labels=data).loss
        loss.backward()
        optimizer.step()
        budget, allocates = allocator.budget_schedule(step)
        before = {n: p.detach().clone() for n, p in parameters.items() if "lora_E" in n}
        recorded = [n for n in parameters if ".layers.0." in n and step in (0, 5) and step < end]
        for n in recorded:
            key = f"step{step}.{n.removesuffix('.default')}"
            tensors |= {f"{key}.param": parameters[n].clone(), f"{key}.grad": parameters[n].grad.clone()}
            if step:
                tensors |= {f"{key}.exp_avg_ipt_before": allocator.exp_avg_ipt[n], f"{key}.exp_avg_unc_before": allocator.exp_avg_unc[n]}
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        for n in recorded:
            key = f"step{step}.{n.removesuffix('.default')}"
            tensors |= {f"{key}.exp_avg_ipt_after": allocator.exp_avg_ipt[n], f"{key}.exp_avg_unc_after": allocator.exp_avg_unc[n]}
        if allocates or step == end:
            for n, e in before.items():
                key = f"mask.step{step}.{n.removesuffix('.default')}"
                tensors |= {f"{key}.before": e, f"{key}.after": parameters[n].detach().clone()}
        if ranked:
            scores = zip(modules, ranked.pop().split(init_r))
            tensors |= {f"mask.step{step}.{module}.lora_E.importance": score.clone() for module, score in scores}
        kept = sum(int((p != 0).sum()) for n, p in parameters.items() if "lora_E" in n)
        trace.append({"step": step, "budget": int(budget), "mask_ind": bool(allocates), "kept_total": kept})
    torch.kthvalue = kthvalue
    config = model.peft_config["default"]
    pattern = {n.removeprefix("base_model.model."): kept for n, kept in config.rank_pattern.items()}
    sidecar = {"config": schedule, "init_budget": init_r * len(modules), "target_budget": schedule["target_r"] * len(modules)}
    put("peft/llama/adalora_trace", tensors, sidecar | {"trace": trace, "rank_pattern": pattern})

    model.eval()
    pruned, config.rank_pattern = config.rank_pattern, {}
    adapter_folder("llama/adalora_masked", model)
    config.rank_pattern = pruned
    model.save_pretrained(OUT / "peft/llama/adalora_pruned")
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), OUT / "peft/llama/adalora_pruned").eval()
    with torch.no_grad():
        ids = torch.randint(0, base.config.vocab_size, (1, 9))
        tensors = {"input_ids": ids, "logits_live": model(ids).logits, "logits_reloaded": reloaded(ids).logits}
        layers = [(n, m, len(m.lora_A["default"])) for n, m in adapted_layers(reloaded)]
        modules = [adapted_module(tensors, n, m, False) for n, m, rank in layers if rank > 0]
    put("peft/llama/adalora_pruned/io", tensors, {"reloaded_modules": [{"module": n, "r": rank} for n, _, rank in layers], "modules": modules})


@torch.no_grad()
def multi_merge():
    model = torch.nn.Module()
    model.layer = torch.nn.Linear(choose.randint(20, 70), choose.randint(20, 70), bias=False)
    kinds = {"a1": {"r": choose.choice([1, 8])}, "a2": {"r": 3, "use_rslora": True}, "a3": {"r": 4, "use_dora": True}}
    for i, (name, options) in enumerate(kinds.items()):
        config = LoraConfig(target_modules=["layer"], init_lora_weights=False, lora_alpha=8, **options)
        model = get_peft_model(model, config, adapter_name=name) if i == 0 else model
        model.add_adapter(name, config) if i else None
    layer, x = randomise(model).base_model.model.layer, torch.randn(4, model.base_model.model.layer.in_features)
    tensors = {"base_weight": layer.base_layer.weight, "x": x, "a3.magnitude": layer.lora_magnitude_vector["a3"].weight}
    for name in kinds:
        tensors |= {f"{name}.lora_A": layer.lora_A[name].weight, f"{name}.lora_B": layer.lora_B[name].weight}
    for order in ["a1", "a1+a2", "a2+a1", "a1+a3", "a3+a1", "a1+a2+a3", "a3+a2+a1"]:
        own = copy.deepcopy(layer)
        own.set_adapter(order.split("+"))
        tensors[f"y.{order}"] = own(x)
        own.merge(adapter_names=order.split("+"))
        tensors |= {f"merged.{order}": own.base_layer.weight, f"y_merged.{order}": own(x)}
    put("peft/multi_merge", tensors, {"scaling": {name: layer.scaling[name] for name in kinds}})


def over_4_bits(layer, **options):
    """The layer with a LoRA of PEFT's `Linear4bit`."""
    model = torch.nn.Module()
    model.layer, model.is_loaded_in_4bit = layer, True
    config = LoraConfig(target_modules=["layer"], init_lora_weights=False, **options)
    return randomise(get_peft_model(model, config)).base_model.model.layer


def stored(prefix, weight):
    state = weight.quant_state
    tensors = {f"{prefix}packed": weight.data, f"{prefix}absmax": scales(state)}
    if state.nested:
        tensors |= {f"{prefix}qabsmax": state.absmax, f"{prefix}nested_absmax": state.state2.absmax, f"{prefix}offset": state.offset.reshape(1)}
    return {key: t.clone() for key, t in tensors.items()}


@torch.no_grad()
def qlora():
    for i, (dtype, nested, dora) in enumerate((d, n, a) for d in DTYPES for n in [False, True] for a in [False, True]):
        n, k, blocksize = choose.choice([16, 33, 48, 63, 96]), choose.choice([32, 50, 64, 130]), choose.choice(BLOCKSIZES)
        weight = (torch.randn(n, k) * 0.06).to(DTYPES[dtype])
        bias = torch.randn(n) * 0.1 if choose.random() < 0.5 else None
        options = {"r": choose.choice([1, 3, 8, 17]), "lora_alpha": choose.choice([4, 7, 16]), "use_rslora": choose.random() < 0.4, "use_dora": dora}
        layer = over_4_bits(linear(weight, bias, blocksize, nested), **options)
        base, a, b, s = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        decoded, dtype = layer_weight(base), base.weight.quant_state.dtype
        tensors = {"weight_before_quantisation": weight, "lora_A": a, "lora_B": b, "delta": layer.get_delta_weight("default")}
        tensors |= stored("base.", base.weight) | ({} if bias is None else {"bias": bias})
        factor = torch.ones(n, dtype=F64)
        if dora:
            tensors["magnitude"] = layer.lora_magnitude_vector["default"].weight
            factor = tensors["magnitude"].double() / torch.linalg.norm(decoded.to(dtype).double() + s * b.double() @ a.double(), dim=1)
        batches = {f"T{t}": torch.randn(t, k) for t in choose.sample([1, 2, 3, 5, 7, 16, 17, 33], 4)}
        for name, x in batches.items():
            y = factor * (x.double() @ (decoded.double() + s * b.double() @ a.double()).T) + (0 if bias is None else bias.double())
            y_f32, y_bf16 = in_both(layer, base, x)
            tensors |= {f"{name}.x": x, f"{name}.y_f64": y, f"{name}.y_f32": y_f32, f"{name}.y_bf16": y_bf16}
        hashes = {"base.dequant_f32": sha256(decoded), "base.dequant_in_quant_state_dtype": sha256(layer_weight(base, dtype))}
        sidecar = {"N": n, "K": k, "blocksize": blocksize, "double_quant": nested, "quant_state_dtype": str(dtype), "bias": bias is not None}
        for name, change in [("merged", layer.merge), ("unmerged", layer.unmerge)]:
            change()
            base.support_avx512bf16_for_cpu = False
            tensors |= stored(f"{name}.", base.weight)
            dtype = base.weight.quant_state.dtype
            hashes[f"{name}.dequant"], sidecar[f"{name}_quant_state_dtype"] = sha256(layer_weight(base, dtype)), str(dtype)
            if name == "merged":
                batch, x = next(iter(batches.items()))
                tensors[f"merged.{batch}.y_f32"] = layer(x)
        put(f"qlora/case{i}", tensors, sidecar | {"lora": options, "scaling": s, "sha256": hashes})


def gradients(layer, parameters, x, dy):
    x = x.clone().requires_grad_(True)
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return {"y": y, "dX": x.grad} | {f"d{name}": p.grad for name, p in parameters.items()}


def adamw(tensors, start, settings):
    """torch's first step, and its fifth from given moments."""
    for name, p0 in start.items():
        m0, v0 = torch.randn_like(p0) * 0.1, torch.rand_like(p0) * 0.1
        tensors |= {f"adamw.step5.m0_{name}": m0, f"adamw.step5.v0_{name}": v0}
        for tag, dtype, step in (("f32", F32, 1), ("f32", F32, 5), ("f64", F64, 1), ("f64", F64, 5)):
            p = torch.nn.Parameter(p0.to(dtype).clone())
            p.grad = tensors[f"{tag}.d{name}"].detach().to(dtype).clone()
            s = settings
            optimizer = torch.optim.AdamW([p], lr=s["lr"], betas=(s["b1"], s["b2"]), eps=s["eps"], weight_decay=s["wd"])
            if step == 5:
                optimizer.state[p] = {"step": torch.tensor(4.0), "exp_avg": m0.to(dtype).clone(), "exp_avg_sq": v0.to(dtype).clone()}
            optimizer.step()
            moments, key = optimizer.state[p], f"adamw.{tag}.step{step}."
            tensors |= {f"{key}{name}": p, f"{key}m_{name}": moments["exp_avg"], f"{key}v_{name}": moments["exp_avg_sq"]}


def train_step():
    for i in range(6):
        n, k, t = choose.choice([16, 33, 48, 70]), choose.choice([32, 50, 66, 96]), choose.choice([1, 3, 8, 17, 40])
        r, alpha, blocksize, nested = choose.choice([1, 3, 8, 16, 33]), choose.choice([4, 5, 16]), choose.choice(BLOCKSIZES), choose.random() < 0.5
        weight, x, dy = torch.randn(n, k) * 0.06, torch.randn(t, k), torch.randn(t, n)
        layer = over_4_bits(linear(weight, None, blocksize, nested), r=r, lora_alpha=alpha)
        a, b, s = layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone(), layer.scaling["default"]
        tensors = {"lora_A": a, "lora_B": b, "x": x, "dY": dy} | stored("base.", layer.base_layer.weight)
        w, x64, dy64, a64, b64 = (z.double() for z in (layer_weight(layer.base_layer), x, dy, a, b))
        tensors["f64.y"] = x64 @ w.T + s * (x64 @ a64.T) @ b64.T
        tensors |= {"f64.dX": dy64 @ w + s * (dy64 @ b64) @ a64, "f64.dA": s * (dy64 @ b64).T @ x64, "f64.dB": s * dy64.T @ (x64 @ a64.T)}
        for tag, dtype, factors in [("f32", F32, F32), ("bf16_mixed", BF16, F32), ("bf16_all", BF16, BF16)]:
            own = copy.deepcopy(layer).train()
            own.base_layer.compute_dtype = own.base_layer.weight.quant_state.dtype = dtype
            parameters = {"A": own.lora_A["default"].weight, "B": own.lora_B["default"].weight}
            for p in parameters.values():
                p.data = p.data.to(factors)
            tensors |= {f"{tag}.{key}": g for key, g in gradients(own, parameters, x.to(dtype), dy).items()}
        settings = {"lr": choose.choice([2e-3, 1e-4]), "b1": choose.choice([0.9, 0.95]), "b2": 0.999, "eps": 1e-8, "wd": choose.choice([0.0, 0.01, 0.1])}
        adamw(tensors, {"A": a, "B": b}, settings)
        put(f"train_step/lora_{i}", tensors, {"blocksize": blocksize, "double_quant": nested, "scaling": s, "adamw": settings})
    for name in ["dora", "adalora"]:
        for i in range(3):
            n, k, t, r = choose.choice([17, 33, 48]), choose.choice([21, 64, 70]), choose.choice([1, 9, 20]), choose.choice([1, 4, 7])
            model = torch.nn.Module()
            model.layer = torch.nn.Linear(k, n)
            options = {"target_modules": ["layer"], "lora_alpha": choose.choice([4, 13])}
            kinds = {"dora": LoraConfig(r=r, use_dora=True, init_lora_weights=False, **options)}
            kinds["adalora"] = AdaLoraConfig(init_r=r, target_r=1, total_step=500, **options)
            layer = randomise(get_peft_model(model, kinds[name])).base_model.model.layer
            tensors = {"x": torch.randn(t, k), "dY": torch.randn(t, n), "weight": layer.base_layer.weight, "bias": layer.base_layer.bias}
            for tag, dtype in [("f32", F32), ("f64", F64)]:
                own = copy.deepcopy(layer).to(dtype)
                if name == "dora":
                    parameters = {"A": own.lora_A["default"].weight, "B": own.lora_B["default"].weight, "m": own.lora_magnitude_vector["default"].weight}
                else:
                    parameters = {part: getattr(own, f"lora_{part}")["default"] for part in "ABE"}
                if dtype == F32:
                    tensors |= {"magnitude" if part == "m" else f"lora_{part}": p.detach().clone() for part, p in parameters.items()}
                own_gradients = gradients(own, parameters, tensors["x"].to(dtype), tensors["dY"])
                tensors |= {f"{tag}.{key}": g for key, g in own_gradients.items()}
            put(f"train_step/{name}_{i}", tensors, {"scaling": float(layer.scaling["default"]), "ranknum": float(r)})


@torch.no_grad()
def multi_adapter():
    for file in ["mix", "single_token", "other"]:
        n, k, t = choose.choice([24, 33, 72]), choose.choice([64, 96, 130]), 1 if file == "single_token" else choose.choice([5, 37, 64])
        ranks = [choose.choice([1, 2, 4, 5, 8, 16, 31, 64, 128]) for _ in range(choose.choice([1, 3, 6, 9]))]
        model = torch.nn.Module()
        model.layer = torch.nn.Linear(k, n, bias=False)
        for i, r in enumerate(ranks):
            config = LoraConfig(target_modules=["layer"], init_lora_weights=False, r=r, lora_alpha=8 + 3 * i, use_rslora=i % 2 == 1)
            model = get_peft_model(model, config, adapter_name="ad0") if i == 0 else model
            model.add_adapter(f"ad{i}", config) if i else None
        layer = randomise(model).base_model.model.layer
        narrow, weight, x, last = copy.deepcopy(layer).to(BF16), layer.base_layer.weight, torch.randn(t, k), len(ranks) - 1
        packed, state = F.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        tensors = {"weight": weight, "x": x, "nf4.packed": packed, "nf4.absmax": state.absmax}
        factors = [(layer.lora_A[f"ad{i}"].weight, layer.lora_B[f"ad{i}"].weight) for i in range(len(ranks))]
        for i, (a, b) in enumerate(factors):
            tensors |= {f"ad{i}.lora_A": a, f"ad{i}.lora_B": b}
        patterns = {"random": [choose.randint(-1, last) for _ in range(t)], "all_none": [-1] * t, "all_same": [last] * t}
        patterns |= {"sorted_runs": sorted(choose.randint(-1, last) for _ in range(t)), "skip_some": [choose.choice([-1, 0]) for _ in range(t)]}

        def truth(weight, index, dtype=F32):
            y = x.to(dtype).double() @ weight.to(dtype).double().T
            for j, i in enumerate(index):
                if i >= 0:
                    a, b = (factor.to(dtype).double() for factor in factors[i])
                    y[j] += layer.scaling[f"ad{i}"] * (b @ (a @ x[j].to(dtype).double()))
            return y

        for pattern, index in patterns.items():
            names = ["__base__" if i < 0 else f"ad{i}" for i in index]
            own = {"adapter_idx": torch.tensor(index, dtype=torch.int32), "y_f64": truth(weight, index), "y_bf16_truth": truth(weight, index, BF16).float()}
            own |= {"y_f32": layer(x[:, None], adapter_names=names)[:, 0], "y_bf16": narrow(x.to(BF16)[:, None], adapter_names=names)[:, 0]}
            if pattern == "random":
                own["nf4.y_f64"] = truth(decode(packed, state.absmax, 64, (n, k)), index)
            tensors |= {f"{pattern}.{key}": value for key, value in own.items()}
        adapters = [{"id": i, "r": r, "lora_alpha": 8 + 3 * i, "use_rslora": i % 2 == 1, "scaling": layer.scaling[f"ad{i}"]} for i, r in enumerate(ranks)]
        put(f"multi_adapter/{file}", tensors, {"N": n, "K": k, "T": t, "adapters": adapters, "patterns": list(patterns)})


# The rest


def svd():
    side = choose.randint(9, 60)
    deltas = {"square": torch.randn(side, side), "tall": torch.randn(60, choose.randint(3, 30)), "wide": torch.randn(choose.randint(3, 30), 70)}
    deltas |= {"low_rank": torch.randn(33, 5) @ torch.randn(5, 47), "zero": torch.zeros(13, 17), "row": torch.randn(1, 12), "column": torch.randn(15, 1)}
    tensors, cases = {}, []
    for name, delta in deltas.items():
        base = torch.randn(delta.shape)
        tuned = base + 0.02 * delta
        change = tuned.double() - base.double()
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        norm, tail, sigma = s.norm().item(), lambda r: s[r:].norm().item(), [*s.tolist(), 0.0]
        ranks = [r for r in [1, 2, 3, 5, 8, 13] if r <= len(s)]
        entries = [
            {
                "r": r,
                "err_fro": tail(r),
                "err_spectral": sigma[r],
                "sigma_r": sigma[r - 1],
                "sigma_r_plus_1": sigma[r],
                "energy_kept": 1.0 if norm == 0 else 1 - (tail(r) / norm) ** 2,
            }
            for r in ranks
        ]
        best = ranks[-1]
        tensors |= {f"{name}.W": base, f"{name}.W_prime": tuned, f"{name}.singular_values_f64": s}
        tensors[f"{name}.best_rank{best}_delta_f64"] = (u[:, :best] * s[:best]) @ v[:best]
        unique = sigma[best - 1] - sigma[best] > 1e-6 * sigma[0]
        cases.append({"name": name, "shape": list(delta.shape), "delta_fro": norm, "ranks": entries, "best_rank_delta_r": best, "best_rank_delta_unique": unique})
    put("svd/svd", tensors, {"cases": cases})


@torch.no_grad()
def real_minilm():
    for i, dtype in enumerate(["f32", "f16"]):
        n, k, blocksize = choose.randint(40, 130), choose.randint(20, 64) * 2, choose.choice(BLOCKSIZES)
        weight, bias, x = (torch.randn(n, k) * 0.05).to(DTYPES[dtype]), torch.randn(n) * 0.1, torch.randn(7, k)
        packed, state = F.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
        tensors = {"weight": weight, "bias": bias, "x": x, "packed": packed, "absmax": state.absmax} | quantise_scales(state.absmax, "dq.")
        hashes = {}
        for prefix, absmax, y in [("", state.absmax, "y_nf4_f64"), ("dq.", tensors["dq.absmax_dequant"], "y_nf4_dq_f64")]:
            decoded = {name: decode(packed, absmax, blocksize, (n, k), d) for name, d in DTYPES.items()}
            hashes |= {f"{prefix}dequant_{name}": sha256(t) for name, t in decoded.items()}
            tensors |= {f"{prefix}dequant_rows_0_4": decoded["f32"][:4], y: x.double() @ decoded["f32"].double().T + bias.double()}
        layer = linear(weight, bias, blocksize, True)
        tensors["y_original_f32"] = torch.nn.functional.linear(x, weight.float(), bias)
        tensors["y_linear4bit_dq_f32"], tensors["y_linear4bit_dq_bf16"] = in_both(layer, layer, x)
        put(f"real_minilm/w{i}", tensors, {"module": f"layer{i}", "shape": [n, k], "blocksize": blocksize, "stored_dtype": dtype, "sha256": hashes})


for number, family in enumerate([nf4_blockwise, nf4_checkpoint, peft, qlora, train_step, multi_adapter, svd, real_minilm]):
    torch.manual_seed(1000 * SEED + number)
    family()
    print(f"{family.__name__} is written", flush=True)
