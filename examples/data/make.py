"""Makes examples/data/minilm_lora with real PEFT: an adapter for one layer of all-MiniLM-L6-v2, after a few steps of training.

    python examples/data/make.py        (with torch, peft and safetensors)
"""

import pathlib

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

ROOT = pathlib.Path(__file__).resolve().parents[2]


class OneLayer(torch.nn.Module):
    """A model that has only this layer, under the name that it has in all-MiniLM-L6-v2."""

    NAME = "encoder.layer.0.attention.self.query"

    def __init__(self, weight, bias):
        super().__init__()
        *path, last = self.NAME.split(".")
        module = self
        for name in path:
            module.add_module(name, torch.nn.Module())
            module = module.get_submodule(name)
        linear = torch.nn.Linear(*reversed(weight.shape))
        linear.weight.data, linear.bias.data = weight.clone(), bias.clone()
        module.add_module(last, linear)

    def forward(self, x):
        return self.get_submodule(self.NAME)(x)


def layer():
    """The layer, inputs of it, and what bitsandbytes made of its weight."""
    return load_file(ROOT / "tests/data/real_minilm/w0.safetensors")


def decoded():
    """The weight as its 4 bits have it."""
    data = layer()
    table = load_file(ROOT / "tests/data/nf4_blockwise/codebooks.safetensors")["nf4_code"]
    codes = data["packed"].flatten()
    blocks = table[torch.stack([codes >> 4, codes & 15], 1).long()].view(-1, 64)
    return (blocks * data["absmax"][:, None]).view(data["weight"].shape)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = layer()
    target = data["x"] @ data["weight"].T + data["bias"]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query"])
    model = get_peft_model(OneLayer(decoded(), data["bias"]), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(20):
        loss = torch.nn.functional.mse_loss(model(data["x"]), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(ROOT / "examples/data/minilm_lora")
    (ROOT / "examples/data/minilm_lora/README.md").unlink(missing_ok=True)
    print(f"loss {loss.item():.3e}")
