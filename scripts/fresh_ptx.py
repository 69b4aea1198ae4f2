"""The PTX that build.rs makes of the kernels as they are now."""

import json
import os
import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent


def compile_kernels():
    """Has cargo compile the kernels, whatever is prebuilt. Returns the folder of the PTX and the path of nvcc."""
    command = ["cargo", "check", "--quiet", "--package", "lora-kernels", "--message-format=json-render-diagnostics"]
    environment = os.environ | {"LORA_KERNELS_PTX": "compile"}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    for message in map(json.loads, output.splitlines()):
        if message["reason"] == "build-script-executed" and "lora-kernels" in message["package_id"]:
            folder = pathlib.Path(message["out_dir"], "ptx")
            if not (folder / "NVCC").exists():
                raise SystemExit("the kernels were not compiled: there is no nvcc")
            return folder, pathlib.Path((folder / "NVCC").read_text())
    raise SystemExit("cargo did not run build.rs")
