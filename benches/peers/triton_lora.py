"""Adapters chosen per token, in Triton, as vLLM does it: tokens grouped by adapter; v zeroed, then summed in 64 shares of K by
atomics; a second kernel that adds v B^T to y. Tile sizes are vLLM's defaults for small batches. The base product is not in it.
"""

import os

import torch
from _timing import DEVICE, GPU, factors_arena, rounds, sweep

if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl

FACTORS = factors_arena()


@triton.jit
def shrink_kernel(
    x, a, v, order, starts, tokens, RANK, K, scaling,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):
    share = tl.program_id(0) % SPLIT_K
    tile = tl.program_id(0) // SPLIT_K
    across = tl.cdiv(RANK, BLOCK_N)
    first_m, first_n = tile // across * BLOCK_M, tile % across * BLOCK_N
    adapter = tl.program_id(1)
    start = tl.load(starts + adapter)
    count = tl.load(starts + adapter + 1) - start
    if first_m >= count:
        return
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    rows = tl.load(order + start + m, mask=m < count, other=0)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K * SPLIT_K)):
        k = (step * SPLIT_K + share) * BLOCK_K + tl.arange(0, BLOCK_K)
        left = tl.load(x + rows[:, None] * K + k[None, :], mask=(m[:, None] < count) & (k[None, :] < K), other=0.0)
        right = tl.load(a + adapter * RANK * K + n[None, :] * K + k[:, None], mask=(n[None, :] < RANK) & (k[:, None] < K), other=0.0)
        total += tl.dot(left, right)
    inside = (m[:, None] < count) & (n[None, :] < RANK)
    tl.atomic_add(v + rows[:, None] * RANK + n[None, :], total * scaling, mask=inside, sem="relaxed")


@triton.jit
def expand_kernel(
    v, b, y, order, starts, tokens, N, RANK,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK_N)
    first_m, first_n = tl.program_id(0) // across * BLOCK_M, tl.program_id(0) % across * BLOCK_N
    adapter = tl.program_id(1)
    start = tl.load(starts + adapter)
    count = tl.load(starts + adapter + 1) - start
    if first_m >= count:
        return
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    rows = tl.load(order + start + m, mask=m < count, other=0)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(tl.cdiv(RANK, BLOCK_K)):
        r = step * BLOCK_K + tl.arange(0, BLOCK_K)
        left = tl.load(v + rows[:, None] * RANK + r[None, :], mask=(m[:, None] < count) & (r[None, :] < RANK), other=0.0)
        right = tl.load(b + adapter * N * RANK + n[None, :] * RANK + r[:, None], mask=(n[None, :] < N) & (r[:, None] < RANK), other=0.0)
        total += tl.dot(left.to(right.dtype), right)
    inside = (m[:, None] < count) & (n[None, :] < N)
    where = y + rows[:, None] * N + n[None, :]
    total += tl.load(where, mask=inside, other=0.0).to(tl.float32)
    tl.store(where, total.to(y.dtype.element_ty), mask=inside)


def branch(x, a, b, v, y, order, starts):
    """Enqueues y += 0.5 (x A^T) B^T."""
    (m, k), (adapters, n, rank) = x.shape, b.shape
    v.zero_()
    shrink_kernel[(64 * triton.cdiv(m, 32) * triton.cdiv(rank, 16), adapters)](
        x, a, v, order, starts, m, rank, k, 0.5, BLOCK_M=32, BLOCK_N=16, BLOCK_K=256, SPLIT_K=64, num_warps=4, num_stages=2
    )
    expand_kernel[(triton.cdiv(m, 64) * triton.cdiv(n, 128), adapters)](
        v, b, y, order, starts, m, n, rank, BLOCK_M=64, BLOCK_N=128, BLOCK_K=32 if rank > 16 else 16, num_warps=4, num_stages=2
    )


def groups(m, adapters):
    """Token numbers in the order of their adapters, and where each adapter's begin."""
    index = torch.arange(m, device=DEVICE, dtype=torch.int32) % adapters
    order = torch.argsort(index, stable=True).to(torch.int32)
    counts = torch.bincount(index, minlength=adapters)
    starts = torch.zeros(adapters + 1, dtype=torch.int32, device=DEVICE)
    starts[1:] = torch.cumsum(counts, 0)
    return order, starts


def check():
    """The kernels compute what they are to be timed for."""
    m, n, k, rank, adapters = 5, 96, 300, 16, 3
    # Triton's interpreter multiplies the bits of bf16.
    dtype = torch.bfloat16 if GPU else torch.float16
    x = torch.randn(m, k, device=DEVICE).to(dtype)
    a = (torch.randn(adapters, rank, k, device=DEVICE) / 16).to(dtype)
    b = torch.randn(adapters, n, rank, device=DEVICE).to(dtype)
    y, v = torch.zeros(m, n, device=DEVICE, dtype=dtype), torch.empty(m, rank, device=DEVICE)
    branch(x, a, b, v, y, *groups(m, adapters))
    for token in range(m):
        chosen = token % adapters
        wanted = 0.5 * (x[token].float() @ a[chosen].float().T) @ b[chosen].float().T
        torch.testing.assert_close(y[token].float(), wanted, rtol=3e-2, atol=3e-2)


def measure(rows, shape, m):
    _, _, n, k = shape
    x = torch.randn(m, k, dtype=torch.bfloat16, device=DEVICE)
    y = torch.zeros(m, n, dtype=torch.bfloat16, device=DEVICE)

    def calls(adapters, rank):
        v = torch.empty(m, rank, dtype=torch.float32, device=DEVICE)
        order, starts = groups(m, adapters)

        def call(a, b):
            return lambda: branch(x, a, b, v, y, order, starts)

        count = min(64, rounds(2 * adapters * rank * (n + k)))
        return [call(FACTORS.take(adapters, rank, k), FACTORS.take(adapters, n, rank)) for _ in range(count)]

    rows.measure("triton", shape, m, "-", "r16-each", lambda: calls(m, 16))
    rows.measure("triton", shape, m, "-", "r16", lambda: calls(1, 16))
    if m in (1, 16):
        rows.measure("triton", shape, m, "-", "r64", lambda: calls(1, 64))


with torch.inference_mode():
    check()
sweep("triton", measure)
