"""Makes adamw8.safetensors: steps of bitsandbytes' own AdamW8bit, on the CPU.

    python adamw8.py        (with bitsandbytes 0.50.2, torch and safetensors)

Its compiled library is kept out: that looks 8-bit codes up in 65536 even bins, and so misses the nearest code of small moments
(tests/data/NOTES.md, 2.3). Every step is stored with what it started from, so that a code on a threshold, which may go either
way, does not carry into the next.
"""

import ctypes
import pathlib

load = ctypes.cdll.LoadLibrary


def load_others(path):
    if "bitsandbytes" in str(path):
        raise OSError("not wanted")
    return load(path)


ctypes.cdll.LoadLibrary = load_others
import bitsandbytes as bnb
import torch
from safetensors.torch import save_file

COUNT, STEPS = 900, 6  # three full blocks and a part
SETTINGS = {"lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}
KEPT = {"m": "state1", "m_absmax": "absmax1", "v": "state2", "v_absmax": "absmax2"}

torch.manual_seed(8)
parameter = torch.nn.Parameter(torch.randn(COUNT) * 0.1)
optimizer = bnb.optim.AdamW8bit([parameter], min_8bit_size=0, **SETTINGS)
tensors = {}
for step in range(1, STEPS + 1):
    parameter.grad = torch.randn(COUNT) * 10 ** (4 * torch.rand(COUNT) - 4)
    parameter.grad[256:512] *= 0 if step < 4 else 1e-6  # a block without gradients at first
    tensors[f"{step}.gradient"] = parameter.grad.clone()
    for when in ["before", "after"]:
        if when == "after":
            optimizer.step()
        state = optimizer.state[parameter]
        tensors[f"{step}.{when}.p"] = parameter.detach().clone()
        tensors |= {f"{step}.{when}.{ours}": state[theirs].clone() for ours, theirs in KEPT.items() if theirs in state}
tensors["map.m"], tensors["map.v"] = state["qmap1"].clone(), state["qmap2"].clone()
save_file(tensors, pathlib.Path(__file__).with_suffix(".safetensors"))
