"""bitsandbytes: its own choice of kernel for 4-bit products, the same with an adapter beside it as PEFT computes it, and a
dequantised weight for cuBLAS."""

import torch
from _timing import BLOCKSIZE, DEVICE, GPU, WEIGHTS, Arena, factors_arena, rounds, sweep

import bitsandbytes
import bitsandbytes.functional as F

CODES = Arena(torch.randint(0, 256, (WEIGHTS // 2,), dtype=torch.uint8, device=DEVICE))
ABSMAX = Arena(torch.rand(WEIGHTS // BLOCKSIZE, device=DEVICE) * 0.02 + 0.02)
NESTED_Q = Arena(torch.randint(0, 256, (WEIGHTS // BLOCKSIZE,), dtype=torch.uint8, device=DEVICE))
NESTED_ABSMAX = Arena(torch.full((WEIGHTS // BLOCKSIZE // 128,), 0.01, device=DEVICE))
FACTORS = factors_arena()
CODE = F.get_4bit_type("nf4", device=DEVICE)
MAP = F.create_dynamic_map().to(DEVICE)
OFFSET = torch.tensor(0.03, device=DEVICE)


def weight(n, k, nested):
    """Codes and their state, as Linear4bit holds them."""
    blocks = n * k // BLOCKSIZE
    if nested:
        outer = F.QuantState(absmax=NESTED_ABSMAX.take(-(-blocks // 256)), code=MAP, blocksize=256, dtype=torch.float32)
        absmax, offset = NESTED_Q.take(blocks), OFFSET
    else:
        outer, absmax, offset = None, ABSMAX.take(blocks), None
    state = F.QuantState(
        absmax=absmax, shape=torch.Size([n, k]), code=CODE, blocksize=BLOCKSIZE, quant_type="nf4", dtype=torch.bfloat16, offset=offset, state2=outer
    )
    return CODES.take(n * k // 2, 1), state


def measure(rows, shape, m):
    _, _, n, k = shape
    x = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)
    count = rounds(n * k // 2)

    def product(nested):
        def call(codes, state):
            return lambda: bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)

        return [call(*weight(n, k, nested)) for _ in range(count)]

    def with_adapter(nested, rank):
        def call(codes, state, a, b):
            return lambda: bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state) + torch.mm(torch.mm(x, a.t()), b.t()) * 0.5

        return [call(*weight(n, k, nested), FACTORS.take(rank, k), FACTORS.take(n, rank)) for _ in range(count)]

    def dequantised(nested):
        def call(codes, state):
            return lambda: torch.mm(x, F.dequantize_4bit(codes, state).t())

        # Each writes and reads the whole dense weight: fewer of them do.
        return [call(*weight(n, k, nested)) for _ in range(min(count, max(2, rounds(2 * n * k))))]

    rows.measure("bitsandbytes", shape, m, "nf4", "none", lambda: product(False))
    rows.measure("bitsandbytes", shape, m, "nf4-nested", "none", lambda: product(True))
    rows.measure("bitsandbytes+peft", shape, m, "nf4", "r16", lambda: with_adapter(False, 16))
    if m in (1, 16) or not GPU:
        rows.measure("bitsandbytes+peft", shape, m, "nf4-nested", "r16", lambda: with_adapter(True, 16))
        rows.measure("bitsandbytes+peft", shape, m, "nf4", "r64", lambda: with_adapter(False, 64))
    if m in (1, 8, 64) or not GPU:
        rows.measure("dequantise+cublas", shape, m, "nf4", "none", lambda: dequantised(False))


sweep("bitsandbytes", measure)
