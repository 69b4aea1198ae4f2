"""What the peers share: shapes, weights in memory, and the clock of benches/decode.rs: a CUDA graph of many calls that take so
many weights in turn that no cache holds them; the median over its replays, divided by the number of calls.

Without a GPU, calls are made once on the CPU, with toy shapes: that shows that a script works, and measures nothing.
"""

import json
import os
import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BLOCKSIZE = 64
# As in benches/decode.rs.
SHAPES = [
    ("Llama-3-8B", "qkv", 6144, 4096), ("Llama-3-8B", "o", 4096, 4096), ("Llama-3-8B", "gate+up", 28672, 4096), ("Llama-3-8B", "down", 4096, 14336),
    ("Llama-3-70B", "qkv", 10240, 8192), ("Llama-3-70B", "o", 8192, 8192), ("Llama-3-70B", "gate+up", 57344, 8192), ("Llama-3-70B", "down", 8192, 28672),
    ("Qwen2.5-7B", "qkv", 4608, 3584), ("Qwen2.5-7B", "o", 3584, 3584), ("Qwen2.5-7B", "gate+up", 37888, 3584), ("Qwen2.5-7B", "down", 3584, 18944),
    ("Llama-2-7B", "qkv", 12288, 4096), ("Llama-2-7B", "gate+up", 22016, 4096), ("Llama-2-7B", "down", 4096, 11008),
    ("Llama-3-8B", "k", 1024, 4096), ("Qwen2.5-7B", "k", 512, 3584),
] if GPU else [("toy", "o", 128, 256)]
TOKENS = [1, 2, 4, 8, 16, 32, 64] if GPU else [1, 3]
ROTATE = 300 << 20 if GPU else 0
REPLAYS = 7
WEIGHTS = 1 << 30 if GPU else 1 << 16


class Arena:
    """Consecutive pieces of one tensor, from its start again when there is no room."""

    def __init__(self, tensor):
        self.tensor, self.next = tensor, 0

    def take(self, *shape):
        count = 1
        for size in shape:
            count *= size
        if self.next + count > self.tensor.numel():
            self.next = 0
        piece = self.tensor[self.next : self.next + count].view(shape)
        self.next += -(-count // 4096) * 4096
        return piece


def dense_arena():
    return Arena(torch.empty(WEIGHTS, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.02))


def factors_arena():
    return Arena(torch.empty(1 << 27 if GPU else 1 << 18, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.05))


def rounds(weight_bytes):
    return max(2, ROTATE // weight_bytes + 1)


def microseconds(calls):
    """The time of one of these calls, each of which enqueues work that has nothing to wait for."""
    if not GPU:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6 / len(calls)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        for call in calls:
            call()
        graph.capture_end()
        graph.replay()
        times = []
        for _ in range(REPLAYS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
    graph.reset()
    return statistics.median(times) / len(calls)


class Rows:
    """What was measured, written after each shape, so that little is lost when time runs out."""

    def __init__(self, name):
        self.name, self.rows, self.start = name, [], time.monotonic()
        self.seconds = float(os.environ.get("PEER_SECONDS", 25))

    def measure(self, peer, shape, m, weight, adapters, calls):
        """Calls is a function that makes them. What a peer cannot do is a row that says why."""
        model, op, n, k = shape
        row = {"peer": peer, "model": model, "op": op, "n": n, "k": k, "m": m, "weight": weight, "adapters": adapters}
        try:
            row["us"] = microseconds(calls())
            print(f"{peer:<22} {model:<11} {op:<8} {n}x{k} M={m:<3} {weight:<10} {adapters:<8} {row['us']:9.2f} us", flush=True)
        except Exception as error:  # noqa: BLE001: one row less, whatever it was
            row["error"] = f"{type(error).__name__}: {error}"[:300]
            print(f"{peer} {model} {op} M={m} {weight} {adapters}: {row['error']}", flush=True)
        self.rows.append(row)

    def over(self):
        """Whether the time is up."""
        return time.monotonic() - self.start > self.seconds

    def write(self):
        if GPU:
            torch.cuda.empty_cache()
        folder = os.environ.get("LORA_KERNELS_RESULTS")
        if folder:
            device = torch.cuda.get_device_name() if GPU else "cpu"
            results = {"peers": self.name, "device": device, "torch": torch.__version__, "rows": self.rows}
            pathlib.Path(folder, f"peers-{self.name}.json").write_text(json.dumps(results) + "\n")


def sweep(name, measure):
    """Calls measure(rows, shape, m) for all shapes and numbers of tokens."""
    rows = Rows(name)
    with torch.inference_mode():
        for shape in SHAPES:
            for m in TOKENS:
                if os.environ.get("PEER_QUICK") and shape[0] != SHAPES[0][0] and m not in (1, 16):
                    continue
                if rows.over():
                    print(f"{name}: no time left before {shape} M={m}", flush=True)
                    rows.write()
                    return
                measure(rows, shape, m)
            rows.write()
    if not any("us" in row for row in rows.rows):
        sys.exit("no row was measured")
