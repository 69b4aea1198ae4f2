#!/usr/bin/env python3
"""Makes fuzz/corpus from tests/data: real files, cut down to what a mutation can get through quickly.

Each input is in the form that fuzz_targets/container.rs describes.
"""
import json, pathlib, struct

here = pathlib.Path(__file__).parent
data = here.parent / "tests/data"


def read(path):
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    body = raw[8 + n :]
    return {k: (v["dtype"], v["shape"], body[slice(*v["data_offsets"])]) for k, v in header.items()}


def text(tensors):
    """Header, zero byte, data."""
    header, body = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    return json.dumps(header, separators=(",", ":")).encode() + b"\0" + body


def write(target, name, raw):
    folder = here / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(raw)


def only(tensors, part):
    return {k: v for k, v in tensors.items() if part in k}


bare = read(data / "nf4_checkpoint/bare.safetensors")
for module in ["proj_c", "proj_d", "proj_e"]:
    write("bitsandbytes_file", module, text(only(bare, module)))
storage = read(data / "nf4_checkpoint/hf_dq_bf16_storage_bf16/model.safetensors")
write("bitsandbytes_file", "storage_bf16", text(only(storage, "layers.0.self_attn.k_proj")))
small = only(bare, "proj_e.bias")
small["other"] = ("I64", [2], bytes(16))
write("bitsandbytes_file", "dense", text(small))
header, body = text(only(bare, "proj_e")).split(b"\0", 1)
write("bitsandbytes_file", "as_it_is", struct.pack("<Q", len(header)) + header + body)

for folder, part in [
    ("gpt2/lora_fifo", "h.0.attn"),
    ("gpt2/dora_fifo", "h.0"),
    ("llama/patterns", "v_proj"),
    ("llama/adalora_pruned", ""),
    ("llama/embed_and_head", "embed_tokens"),
    ("llama/rslora_r16", "layers.0.self_attn.v_proj"),
    ("llama_bias/bias_lora_only", "layers.0"),
    ("llama_bias/lora_bias", "layers.0.self_attn.v_proj"),
]:
    config = json.loads((data / "peft" / folder / "adapter_config.json").read_text())
    # What is off need not be there, and would only be in the way.
    config = {k: v for k, v in config.items() if v not in (None, False, {}, [])}
    tensors = only(read(data / "peft" / folder / "adapter_model.safetensors"), part)
    raw = json.dumps(config, separators=(",", ":")).encode() + b"\0" + text(tensors)
    write("peft_adapter", folder.replace("/", "_"), raw)

# A number of a merge alone is its real record; 128 more, and what follows is one.
for merge in range(7):
    write("undo_record", f"real_{merge}", bytes([merge]))
write("undo_record", "edited", bytes([1, 200, 0, 1]))
write("undo_record", "empty", bytes([128]))
