"""A 4-bit linear layer with an adapter per token, from Python by ctypes, on CPU memory.

    cargo build --release -p lora-kernels-c
    python3 integrations/c/examples/linear.py

With PyTorch installed it works on torch tensors, without copies; otherwise on ctypes arrays.
"""

import argparse
import ctypes as c
import pathlib
import random

LK_F32 = 0


class Weight(c.Structure):
    _fields_ = [("n", c.c_size_t), ("k", c.c_size_t), ("dense", c.c_void_p), ("nf4", c.c_void_p)]


class Adapter(c.Structure):
    _fields_ = [
        ("lora_a", c.c_void_p),
        ("lora_b", c.c_void_p),
        ("magnitude", c.c_void_p),
        ("rank", c.c_size_t),
        ("scaling", c.c_double),
    ]


class Matmul(c.Structure):
    _fields_ = [
        ("tokens", c.c_size_t),
        ("dtype", c.c_uint32),
        ("adapter_dtype", c.c_uint32),
        ("weight", Weight),
        ("x", c.c_void_p),
        ("bias", c.c_void_p),
        ("row_scale", c.c_void_p),
        ("adapters", c.POINTER(Adapter)),
        ("adapter_count", c.c_size_t),
        ("adapter_index", c.c_void_p),
        ("y", c.c_void_p),
    ]


class Library:
    """The shared library; a call that fails raises its message."""

    def __init__(self, path):
        self.lib = c.CDLL(str(path))
        self.lib.lk_last_error.restype = c.c_char_p
        assert self.lib.lk_abi_version() == 1, "another version of the interface"
        self.lib.lk_nf4_free.argtypes = [c.c_void_p]
        self.lib.lk_nf4_free.restype = None

    def __call__(self, name, *arguments):
        if getattr(self.lib, name)(*arguments) != 0:
            raise ValueError(self.lib.lk_last_error().decode())


def floats(values):
    """f32 memory with these values, and its address: a torch tensor where there is torch."""
    try:
        import torch
    except ImportError:
        array = (c.c_float * len(values))(*values)
        return array, c.addressof(array)
    tensor = torch.tensor(values, dtype=torch.float32)
    return tensor, tensor.data_ptr()


def main():
    parser = argparse.ArgumentParser()
    release = pathlib.Path(__file__).parents[3] / "target/release/liblora_kernels_c.so"
    parser.add_argument("--library", type=pathlib.Path, default=release)
    lk = Library(parser.parse_args().library)

    n, k, rank, tokens, scaling = 32, 64, 4, 3, 0.5
    draw = random.Random(1)
    numbers = lambda count: [draw.uniform(-1, 1) for _ in range(count)]
    weight, weight_at = floats(numbers(n * k))
    x, x_at = floats(numbers(tokens * k))
    lora_a, a_at = floats(numbers(rank * k))
    lora_b, b_at = floats(numbers(n * rank))
    y, y_at = floats([0.0] * (tokens * n))
    index = (c.c_int32 * tokens)(0, -1, 0)

    nf4 = c.c_void_p()
    size = c.c_size_t
    lk("lk_nf4_quantize", c.c_void_p(weight_at), LK_F32, size(n), size(k), size(64), c.c_bool(True), c.byref(nf4))
    adapters = (Adapter * 1)(Adapter(a_at, b_at, None, rank, scaling))
    operands = Matmul(
        tokens=tokens,
        dtype=LK_F32,
        adapter_dtype=LK_F32,
        weight=Weight(n, k, None, nf4),
        x=x_at,
        adapters=adapters,
        adapter_count=1,
        adapter_index=c.addressof(index),
        y=y_at,
    )
    lk("lk_matmul", c.byref(operands))

    # The same in Python, over the decoded weight.
    decoded, decoded_at = floats([0.0] * (n * k))
    lk("lk_nf4_dequantize", nf4, LK_F32, c.c_void_p(decoded_at), size(n * k))
    lk.lib.lk_nf4_free(nf4)
    listed = lambda memory: [float(v) for v in memory]
    w, xs, a, b, ys = map(listed, (decoded, x, lora_a, lora_b, y))
    for t in range(tokens):
        token = xs[t * k : (t + 1) * k]
        v = [sum(p * q for p, q in zip(token, a[r * k : (r + 1) * k])) for r in range(rank)]
        for row in range(n):
            want = sum(p * q for p, q in zip(token, w[row * k : (row + 1) * k]))
            if index[t] == 0:
                want += scaling * sum(p * q for p, q in zip(v, b[row * rank : (row + 1) * rank]))
            # Fewer than 128 roundings of sums whose magnitudes are below 256.
            assert abs(ys[t * n + row] - want) <= 128 * 2**-24 * 256, (t, row, ys[t * n + row], want)

    try:
        lk("lk_nf4_quantize", None, LK_F32, size(n), size(k), size(64), c.c_bool(True), c.byref(nf4))
    except ValueError as error:
        print("a mistake gives:", error)
    kind = type(y).__module__.split(".")[0]
    print(f"[{tokens}, {k}] x [{n}, {k}] in 4 bits with adapters, on memory of {kind}: the two agree")


if __name__ == "__main__":
    main()
