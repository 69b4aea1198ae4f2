"""Runs the scripts that it is given, one after the other, in one process: what takes long to import is imported once. Where PEER_GO
names a file, it waits for that before it measures.
"""

import importlib
import os
import pathlib
import runpy
import sys
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
for package in ("torch", "triton", "bitsandbytes"):
    try:
        importlib.import_module(package)
    except Exception as error:  # noqa: BLE001: the script that needs it will say so
        print(f"{package}: {type(error).__name__}: {error}", flush=True)

from _timing import DEVICE, torch

# cuBLAS is loaded by its first product.
a = torch.ones(16, 16, dtype=torch.bfloat16, device=DEVICE)
print(torch.mm(a, a)[0, 0].item(), flush=True)
go = os.environ.get("PEER_GO")
while go and not os.path.exists(go):
    time.sleep(0.02)
failed = []
for path in sys.argv[1:]:
    start = time.monotonic()
    try:
        runpy.run_path(path, run_name="__main__")
    except BaseException:  # noqa: BLE001: the others go on
        traceback.print_exc()
        failed.append(path)
    print(f"{path}: {time.monotonic() - start:.1f} s", flush=True)
sys.exit(bool(failed))
