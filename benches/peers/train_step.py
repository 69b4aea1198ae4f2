"""A training step of one 4-bit layer with an adapter on the CPU, by this library and by PEFT over bitsandbytes, in turn on the same
cores: forward, backward with the gradient of the inputs, AdamW; all in f32.

    cargo build --release --bench training_step
    python benches/peers/train_step.py target/release/deps/training_step-*[!.d]  [--threads 2]

Prints a table: the fastest of some steps of each, of three rounds that take turns.
"""

import argparse
import os
import subprocess
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("binary", help="the built benchmark")
parser.add_argument("--threads", type=int, default=os.cpu_count())
args = parser.parse_args()
os.environ["RAYON_NUM_THREADS"] = str(args.threads)

import bitsandbytes as bnb  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(args.threads)
SHAPES = [(1024, 1024, 256, 16), (2048, 2048, 256, 16), (4096, 4096, 128, 16), (4096, 4096, 512, 16)]
ROUNDS, STEPS, SECONDS = 3, 3, 2.0


class Peft:
    """What `Linear4bit` with a LoRA of PEFT does in a step."""

    def __init__(self, n, k, m, rank):
        base = torch.nn.Module()
        base.layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        base.layer.weight = bnb.nn.Params4bit(torch.randn(n, k) * 0.02, requires_grad=False, quant_type="nf4").to("cpu")
        base.forward = lambda x: base.layer(x)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"], lora_dropout=0.0)
        self.model = peft.get_peft_model(base, config).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in trained:
            torch.nn.init.normal_(p, std=0.05)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self.x = torch.randn(m, k, requires_grad=True)

    def step(self):
        y = self.model(self.x)
        y.backward(y.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None

    def milliseconds(self):
        self.step()
        begin, fastest, count = time.perf_counter(), float("inf"), 0
        while count < STEPS or time.perf_counter() - begin < SECONDS:
            start = time.perf_counter()
            self.step()
            fastest = min(fastest, time.perf_counter() - start)
            count += 1
        return fastest * 1e3


print(f"{args.threads} threads; torch {torch.__version__}, peft {peft.__version__}, bitsandbytes {bnb.__version__}\n")
print("| out x in | tokens | rank | this library, ms | PEFT, ms | PEFT / this library |")
print("|---|---|---|---|---|---|")
for shape in SHAPES:
    n, k, m, rank = shape
    theirs, ours = Peft(*shape), []
    times = []
    for _ in range(ROUNDS):
        run = subprocess.run([args.binary, *map(str, shape)], capture_output=True, text=True, check=True)
        ours.append(float(run.stdout.split()[-1]))
        times.append(theirs.milliseconds())
    print(f"| {n} x {k} | {m} | {rank} | {min(ours):.1f} | {min(times):.1f} | {min(times) / min(ours):.2f} |", flush=True)
sys.stdout.flush()
