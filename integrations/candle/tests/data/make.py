"""Makes the adapters and logits of this folder, with transformers, PEFT and bitsandbytes, on the CPU:

    python make.py

The base is tests/data/nf4_checkpoint/hf_dq_bf16 of this repository, a tiny Llama in NF4 with double quantisation. All
arithmetic is f32: what is stored in bf16 is widened, and 4-bit weights are decoded to f32.
"""

import importlib.metadata
import json
import pathlib
import platform

import bitsandbytes as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
BASE = HERE.parents[3] / "tests/data/nf4_checkpoint/hf_dq_bf16"

CONFIGS = {
    "first": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False),
    "second": LoraConfig(
        r=5,
        lora_alpha=7,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 3},
        init_lora_weights=False,
    ),
}


def dequantize(packed, state):
    """The weight in f32 by bitsandbytes' torch code: its native CPU code has defects (tests/data/NOTES.md, 2)."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = packed.view(torch.uint8).reshape(-1)
    return _dequantize_4bit_compute(packed, absmax.float(), state.code, state.blocksize, state.shape, torch.float32)


def forward(self, x):
    assert x.dtype == torch.float32 and self.bias is None
    return torch.nn.functional.linear(x, dequantize(self.weight.data, self.weight.quant_state))


bnb.nn.Linear4bit.forward = forward


def build():
    model = AutoModelForCausalLM.from_pretrained(BASE)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    model.name_or_path = "hf_dq_bf16"
    torch.manual_seed(7)
    model = get_peft_model(model, CONFIGS["first"], adapter_name="first")
    model.add_adapter("second", CONFIGS["second"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            # Large enough that the logits change by as much as they are.
            torch.nn.init.normal_(parameter, std=0.15 if "lora_A" in name else 0.1)
    return model.eval()


model = build()
torch.manual_seed(8)
input_ids = torch.randint(0, model.config.vocab_size, (3, 11))
tensors = {"input_ids": input_ids}
with torch.no_grad():
    with model.disable_adapter():
        tensors["logits_base"] = model(input_ids).logits
    for name in CONFIGS:
        model.set_adapter(name)
        tensors[f"logits_{name}"] = model(input_ids).logits
    tensors["logits_mixed"] = model(input_ids, adapter_names=["second", "__base__", "first"]).logits
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "logits.safetensors")
model.save_pretrained(HERE, selected_adapters=list(CONFIGS))
(HERE / "README.md").unlink()
packages = ["torch", "bitsandbytes", "peft", "transformers", "safetensors"]
versions = {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages}
about = "logits of tests/data/nf4_checkpoint/hf_dq_bf16 with the adapters of this folder, all in f32; mixed: second, none, first"
(HERE / "logits.json").write_text(json.dumps({"about": about, "versions": versions}, indent=1) + "\n")
for name, tensor in tensors.items():
    print(name, tuple(tensor.shape), tensor.float().std().item())
