"""Makes adalora.safetensors: a short AdaLoRA training with PEFT, and all that its `RankAllocator` saw and did.

    python adalora.py        (with PEFT 0.21.2, torch and safetensors)

Of every step: the parameters after AdamW (`param`), their gradients (`grad`), and `lora_E` after the allocator (`masked`); where
ranks were allocated, the scores that it ranked (`score`).
"""

import pathlib

import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import save_file

STEPS = 16


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(7, 11)
        self.down = torch.nn.Linear(11, 6)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


torch.manual_seed(21)
config = AdaLoraConfig(
    init_r=5, target_r=2, tinit=2, tfinal=4, deltaT=3, total_step=STEPS, lora_alpha=8, target_modules=["up", "down"]
)
model = get_peft_model(Model(), config)
x, wanted = torch.randn(32, 7), torch.randn(32, 6)
parameters = {name.replace("base_model.model.", "").replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
optimizer = torch.optim.AdamW(parameters.values(), lr=2e-2)

# The allocator takes its threshold of the scores of one module after the other.
ranked, kthvalue = [], torch.kthvalue
torch.kthvalue = lambda scores, k: ranked.append(scores) or kthvalue(scores, k=k)

tensors = {}
for step in range(STEPS):
    (model(x) - wanted).square().mean().backward()
    optimizer.step()
    for name, p in parameters.items():
        tensors[f"step{step}.{name}.param"], tensors[f"step{step}.{name}.grad"] = p.detach().clone(), p.grad.clone()
    model.base_model.update_and_allocate(step)
    optimizer.zero_grad()
    for name in ["up", "down"]:
        tensors[f"step{step}.{name}.masked"] = parameters[f"{name}.lora_E"].detach().clone()
    if ranked:
        scores = ranked.pop().split(config.init_r)
        tensors |= {f"step{step}.{name}.score": score.clone() for name, score in zip(["up", "down"], scores)}
save_file(tensors, pathlib.Path(__file__).with_suffix(".safetensors"))
