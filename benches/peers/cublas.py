"""cuBLAS through torch: the product with a bf16 weight; and with an adapter beside it, as PEFT computes it."""

import torch
from _timing import DEVICE, dense_arena, factors_arena, rounds, sweep

WEIGHTS, FACTORS = dense_arena(), factors_arena()


def measure(rows, shape, m):
    _, _, n, k = shape
    x = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)
    y = torch.empty(m, n, dtype=torch.bfloat16, device=DEVICE)

    def plain():
        def call(weight):
            return lambda: torch.mm(x, weight.t(), out=y)

        return [call(WEIGHTS.take(n, k)) for _ in range(rounds(2 * n * k))]

    def with_adapter(rank):
        def call(weight, a, b):
            def run():
                torch.mm(x, weight.t(), out=y)
                y.add_(torch.mm(torch.mm(x, a.t()), b.t()) * 0.5)

            return run

        return [call(WEIGHTS.take(n, k), FACTORS.take(rank, k), FACTORS.take(n, rank)) for _ in range(rounds(2 * n * k))]

    rows.measure("cublas", shape, m, "bf16", "none", plain)
    rows.measure("cublas+peft", shape, m, "bf16", "r16", lambda: with_adapter(16))
    if m in (1, 16):
        rows.measure("cublas+peft", shape, m, "bf16", "r64", lambda: with_adapter(64))


sweep("cublas", measure)
