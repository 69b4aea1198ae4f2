"""The PTX that build.rs makes of the kernels as they are now, and the machine code that ptxas makes of it."""

import hashlib
import json
import os
import pathlib
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
CUBINS = ROOT / "target" / "cubins"


def compile_kernels():
    """Has cargo compile the kernels, whatever is prebuilt. Returns the folder of the PTX and the path of nvcc."""
    command = ["cargo", "check", "--quiet", "--workspace", "--message-format=json-render-diagnostics"]
    environment = os.environ | {"LORA_KERNELS_PTX": "compile"}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    for message in map(json.loads, output.splitlines()):
        folder = pathlib.Path(message.get("out_dir", ""), "ptx")
        if message["reason"] == "build-script-executed" and (folder / "NVCC").exists():
            return folder, pathlib.Path((folder / "NVCC").read_text())
    raise SystemExit("the kernels were not compiled: there is no nvcc")


def assemble(ptxas, ptx, device):
    """Returns the file of a module's machine code for a device, and what `ptxas -v` says of it. Does it once for each text, and keeps both.

    Raises subprocess.CalledProcessError, with what ptxas says, when it refuses the module.
    """
    key = hashlib.sha256(f"{ptxas}\n".encode() + ptx.read_bytes()).hexdigest()[:16]
    cubin = CUBINS / f"{ptx.stem}.{device}.{key}.cubin"
    log = cubin.with_suffix(".log")
    if not log.exists():
        CUBINS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CUBINS) as partial:
            partial = pathlib.Path(partial)
            command = [ptxas, "-v", f"-arch={device}", "-o", partial / "cubin", ptx]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
            (partial / "log").write_text(said)
            os.rename(partial / "cubin", cubin)
            os.rename(partial / "log", log)
    return cubin, log.read_text()
