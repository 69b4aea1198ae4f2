"""Products, merges, quantising and dequantising on the CPU: this library by its C interface, bitsandbytes' CPU backend and torch, in one
process on the same cores and tensors.

    cargo build --release -p lora-kernels-c
    python benches/peers/cpu_products.py [--threads 2] [--quick] [--result benches/results/NAME]

Needs torch and bitsandbytes (tests/interop/requirements.txt). The programs take turns; a time is the median over --rounds of such
turns, each of as many calls as fit into --seconds (at least one). Weights rotate over more than 64 MB, as they do in a model, so
that the last cache does not hold them.

* product: `x Wᵀ` of M tokens. Ours and bitsandbytes' (`matmul_4bit`) take W in NF4 with blocks of 64; torch's `linear` takes it dense in
  the type of x. With an adapter of rank 16: ours in the same call; beside the others two more `linear`.
* merge: a LoRA of rank 16 into a dense weight, in place: torch's `W.add_(B A, alpha=s)`, as PEFT merges, and `W.addmm_`, which makes no delta. Ours is asked
  for no report, and looks whether all stays finite before it writes.
* merge into NF4: as PEFT does it with bitsandbytes, `quantize_4bit(dequantize_4bit(W) + s B A)`; ours reports, besides.
* quantise, dequantise: `quantize_4bit` and `dequantize_4bit`, blocks of 64, scales in f32.
"""

import argparse
import ctypes as c
import datetime
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
parser = argparse.ArgumentParser()
parser.add_argument("--library", type=pathlib.Path, default=ROOT / "target/release/liblora_kernels_c.so")
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--seconds", type=float, default=0.08, help="of one program's turn")
parser.add_argument("--quick", action="store_true", help="the small shape only")
parser.add_argument("--ours", action="store_true", help="without the others")
parser.add_argument("--result", type=pathlib.Path, help="writes RESULT.json and RESULT.md")
args = parser.parse_args()
# Both kinds of threads read these when they start.
os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(args.threads)

import bitsandbytes as bnb  # noqa: E402
import bitsandbytes.functional as bnbf  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(ROOT / "integrations/c/examples"))
from linear import Adapter, Library, Matmul, Weight  # noqa: E402

torch.set_num_threads(args.threads)
SHAPES = [(1024, 1024), (1024, 4096), (4096, 4096), (4096, 14336), (14336, 4096)]
TOKENS = [1, 4, 32, 128]
DTYPES = {"f32": (0, torch.float32), "f16": (1, torch.float16), "bf16": (2, torch.bfloat16)}
BLOCKSIZE, RANK, SCALING = 64, 16, 0.5
ROTATE = 64 << 20
lk = Library(args.library)
size, address = c.c_size_t, lambda tensor: c.c_void_p(tensor.data_ptr())


class Ours:
    """One weight as this library holds it."""

    def __init__(self, dense, dtype):
        (self.n, self.k), (self.code, _) = dense.shape, DTYPES[dtype]
        self.dense, self.handle = dense, c.c_void_p()
        self.quantise(self.handle)

    def quantise(self, handle):
        lk("lk_nf4_quantize", address(self.dense), self.code, size(self.n), size(self.k), size(BLOCKSIZE), c.c_bool(False), c.byref(handle))

    def quantise_and_free(self):
        handle = c.c_void_p()
        self.quantise(handle)
        lk.lib.lk_nf4_free(handle)

    def dequantise(self):
        out = torch.empty_like(self.dense)
        lk("lk_nf4_dequantize", self.handle, self.code, address(out), size(out.numel()))
        return out

    def product(self, x, adapter=None):
        y = torch.empty(x.shape[0], self.n, dtype=x.dtype)
        operands = Matmul(tokens=x.shape[0], dtype=self.code, adapter_dtype=self.code, weight=Weight(self.n, self.k, None, self.handle), x=x.data_ptr(), y=y.data_ptr())
        if adapter:
            operands.adapters, operands.adapter_count = self.adapters(adapter), 1
        lk("lk_matmul", c.byref(operands))
        return y

    def adapters(self, adapter):
        lora_a, lora_b = adapter
        return (Adapter * 1)(Adapter(lora_a.data_ptr(), lora_b.data_ptr(), None, RANK, SCALING))

    def merge(self, dense, adapter):
        weight = Weight(self.n, self.k, dense.data_ptr(), None)
        lk("lk_merge", c.byref(weight), self.code, self.adapters(adapter), size(1), self.code, self.code, address(dense), None)
        return dense

    def merge_nf4(self, adapter):
        merged = c.c_void_p()
        lk("lk_nf4_merge", self.handle, self.adapters(adapter), size(1), self.code, c.c_double(-1e30), c.byref(merged), None)
        lk.lib.lk_nf4_free(merged)


def measure(programs):
    """The median milliseconds of each program: pairs of a function and the things that it is called with in turn."""
    times = {name: [] for name in programs}
    turns = {name: itertools.cycle(things) for name, (_, things) in programs.items()}
    for name, (call, _) in programs.items():
        call(next(turns[name]))
    for _ in range(args.rounds):
        for name, (call, _) in programs.items():
            count, start = 0, time.perf_counter()
            while count == 0 or time.perf_counter() - start < args.seconds:
                call(next(turns[name]))
                count += 1
            times[name].append((time.perf_counter() - start) * 1e3 / count)
    return {name: round(statistics.median(of), 4) for name, of in times.items()}


def close(ours, theirs, share):
    """Whether two results are the same but for the rounding of the type of x."""
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert error < share, f"the programs disagree by {error:.1e}"


rows = []


def record(operation, n, k, dtype, times, m=None):
    ours, peers = times["ours"], {name: ms for name, ms in times.items() if name != "ours"}
    row = {"operation": operation, "n": n, "k": k, "m": m, "dtype": dtype, "ours_ms": ours, "peers_ms": peers}
    rows.append(row)
    others = ", ".join(f"{name} {ms:.3f} ({ms / ours:.2f}x)" for name, ms in peers.items())
    print(f"{operation:<22} {n}x{k} M={m or '-':<4} {dtype:<5} ours {ours:.3f} ms; {others}", flush=True)


def run(n, k, dtype):
    torch.manual_seed(1)
    code, kind = DTYPES[dtype]
    copies = lambda bits: max(2, round(ROTATE * 8 / (n * k * bits) + 0.5))  # noqa: E731
    first = (torch.randn(n, k) * 0.02).to(kind)
    adapter = (torch.randn(RANK, k) * 0.05).to(kind), (torch.randn(n, RANK) * 0.05).to(kind)
    dense = [first] + [first.clone() for _ in range(copies(8 * first.element_size()) - 1)]
    ours = [Ours(dense[i % len(dense)], dtype) for i in range(copies(4.5))]
    packed, state = bnbf.quantize_4bit(first, blocksize=BLOCKSIZE, quant_type="nf4")
    theirs = [(packed.clone(), state) for _ in range(copies(4))]
    peers = lambda programs: {} if args.ours else programs  # noqa: E731
    linear, (lora_a, lora_b) = torch.nn.functional.linear, adapter
    share = 2e-6 * k**0.5 if dtype == "f32" else 2e-2
    for m in TOKENS:
        x = torch.randn(m, k).to(kind)
        four = lambda w: bnb.matmul_4bit(x, w[0].t(), w[1])  # noqa: B023, E731
        plain = lambda w: linear(x, w)  # noqa: B023, E731
        branch = lambda y: y + linear(linear(x, lora_a), lora_b) * SCALING  # noqa: B023, E731
        close(ours[0].product(x), four(theirs[0]), share)
        close(ours[0].product(x, adapter), branch(four(theirs[0])), share)
        times = measure({"ours": (lambda w: w.product(x), ours), **peers({"bitsandbytes": (four, theirs), "torch, dense": (plain, dense)})})  # noqa: B023
        record("product", n, k, dtype, times, m)
        with_branch = {"bitsandbytes": (lambda w: branch(four(w)), theirs), "torch, dense": (lambda w: branch(plain(w)), dense)}  # noqa: B023
        record("product with LoRA", n, k, dtype, measure({"ours": (lambda w: w.product(x, adapter), ours), **peers(with_branch)}), m)  # noqa: B023
    delta = lambda: (lora_b @ lora_a) * SCALING  # noqa: E731
    close(ours[0].merge(first.clone(), adapter), first + delta(), share)
    # In place, again and again: adapters that are too small to let weights grow.
    tiny, places = tuple(factor * 1e-3 for factor in adapter), [w.clone() for w in dense]
    torch_merges = {
        "torch": (lambda w: w.add_(tiny[1] @ tiny[0], alpha=SCALING), places),
        "torch, addmm_": (lambda w: w.addmm_(tiny[1], tiny[0], alpha=SCALING), places),
    }
    record("merge", n, k, dtype, measure({"ours": (lambda w: ours[0].merge(w, tiny), places), **peers(torch_merges)}))
    del places
    requantise = lambda w: bnbf.quantize_4bit(bnbf.dequantize_4bit(*w) + delta(), blocksize=BLOCKSIZE, quant_type="nf4")  # noqa: E731
    record("merge into NF4", n, k, dtype, measure({"ours": (lambda w: w.merge_nf4(adapter), ours), **peers({"bitsandbytes": (requantise, theirs)})}))
    quantise = lambda w: bnbf.quantize_4bit(w, blocksize=BLOCKSIZE, quant_type="nf4")  # noqa: E731
    record("quantise", n, k, dtype, measure({"ours": (lambda w: w.quantise_and_free(), ours), **peers({"bitsandbytes": (quantise, dense)})}))
    assert torch.equal(ours[0].dequantise(), bnbf.dequantize_4bit(*theirs[0]))
    record("dequantise", n, k, dtype, measure({"ours": (lambda w: w.dequantise(), ours), **peers({"bitsandbytes": (lambda w: bnbf.dequantize_4bit(*w), theirs)})}))
    for w in ours:
        lk.lib.lk_nf4_free(w.handle)


def machine():
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.machine()]
    return f"{names[0]} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"


def write(loads):
    versions = {name: importlib.metadata.version(name) for name in ["torch", "bitsandbytes"]}
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "date": str(datetime.date.today()), "machine": machine(), "threads": args.threads, "commit": commit, "rounds": args.rounds,
        "load": [round(min(loads), 1), round(max(loads), 1)], "versions": versions, "rows": rows,
    }
    args.result.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"# Products, merges and 4-bit codes on the CPU, {result['date']}", "",
        f"{result['machine']}, {args.threads} threads; {', '.join(f'{name} {version}' for name, version in versions.items())}; commit {commit}. Milliseconds, "
        f"medians of {args.rounds} turns; how many times ours that is. The load of the machine was {result['load'][0]} to {result['load'][1]}. Made by "
        "`benches/peers/cpu_products.py`, which says what is timed.", "",
        "| | out x in | tokens | type | this library | bitsandbytes | | torch, dense | |", "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for peer in ["bitsandbytes", "torch"]:
            ms = next((ms for name, ms in row["peers_ms"].items() if name.startswith(peer)), None)
            cells += [f"{ms:.3f}", f"{ms / row['ours_ms']:.1f}"] if ms else ["", ""]
        lines.append(f"| {row['operation']} | {row['n']} x {row['k']} | {row['m'] or ''} | {row['dtype']} | {row['ours_ms']:.3f} | {' | '.join(cells)} |")
    slower = [row for row in rows if any(ms < row["ours_ms"] for ms in row["peers_ms"].values())]
    lines += ["", f"{len(rows) - len(slower)} of {len(rows)} rows are faster than every peer."]
    args.result.with_suffix(".md").write_text("\n".join(lines) + "\n")


def main():
    loads = []
    with torch.inference_mode():
        for (n, k), dtype in itertools.product(SHAPES[:1] if args.quick else SHAPES, ["f32", "bf16"]):
            loads.append(os.getloadavg()[0])
            run(n, k, dtype)
            if args.result and not args.ours:
                write(loads)


main()
