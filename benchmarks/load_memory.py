"""A checkpoint of floats with a billion parameters, loaded into 8 bits in each way: the most memory, and the time.

    python -m benchmarks.load_memory [--precision int8] [--layers 22] [--dtype bfloat16] [--ways swap,config] [--json FILE]

The checkpoint is a Llama of TinyLlama's sizes with random weights, in bfloat16, written to a temporary folder and removed at the
end. Each way has a process of its own:

    swap     from_pretrained, then fp.swap(model, precision, keep=False)
    config   from_pretrained(quantization_config=fp.Config(precision))
    folder   fp.load_pretrained of the folder that fp.save_pretrained wrote
    save     fp.save_pretrained of a model that is loaded
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import pathlib
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import bench
from benchmarks.stored_checkpoint import memory

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
WAYS = ("swap", "config", "folder", "save")
SHARD_BYTES = 500_000_000
#: Seconds between two looks at how much anonymous memory there is.
TICK = 0.002


def write(folder: pathlib.Path, layers: int) -> int:
    """Writes the checkpoint, one shard in memory at a time. Returns how many parameters it has."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=layers, **SIZES)
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    folder.mkdir()
    config.save_pretrained(folder)
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, p in parameters.items():
        if 2 * p.numel() > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= 2 * p.numel()
    torch.manual_seed(0)
    places: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.randn(parameters[name].shape, dtype=torch.bfloat16).mul_(0.02) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(p.numel() for p in parameters.values())


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Fills in, at the end of the block, its seconds, and the most bytes that it held beyond those before it: resident ones, and
    anonymous ones. Resident memory counts the pages of mapped files, which the system takes back when it needs them."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    result: dict[str, float] = {}
    resident, anonymous, began = memory("VmRSS"), memory("RssAnon"), time.monotonic()
    most, ended = anonymous, threading.Event()

    def look() -> None:
        nonlocal most
        while not ended.wait(TICK):
            most = max(most, memory("RssAnon"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield result
    finally:
        ended.set()
        thread.join()
        result |= {
            "seconds": time.monotonic() - began,
            "resident_bytes": memory("VmHWM") - resident,
            "anonymous_bytes": max(most, memory("RssAnon")) - anonymous,
            "left_bytes": memory("RssAnon") - anonymous,
            "maxrss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        }


def run(connection: Connection, way: str, precision: str, dtype: str, floats: str, folder: str, threads: int) -> None:
    """One way, in this process."""
    torch.set_num_threads(threads)
    import transformers

    import forwardpass as fp

    # The class, and all that it imports, before memory is read.
    config = transformers.AutoConfig.from_pretrained(floats)
    cls: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    model: Any = None
    if way == "save":
        model = cls.from_pretrained(floats, quantization_config=fp.Config(precision), **options)
    with watched() as result:
        if way == "swap":
            model = cls.from_pretrained(floats, **options)
            fp.swap(model, precision, keep=False)
        elif way == "config":
            model = cls.from_pretrained(floats, quantization_config=fp.Config(precision), **options)
        elif way == "folder":
            model = fp.load_pretrained(folder)
        else:
            fp.save_pretrained(model, folder)
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(1, 33)[None]).logits[0, -1].float()
    connection.send((result, logits.tolist()))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    result = bench.header("load_memory", "cpu", ["ways"])
    spawn = multiprocessing.get_context("spawn")
    ways: dict[str, dict[str, float]] = {}
    logits: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        floats, folder = pathlib.Path(name, "floats"), pathlib.Path(name, "folder")
        parameters = write(floats, args.layers)
        for way in sorted(args.ways.split(","), key=("swap", "config", "save", "folder").index):
            here, there = spawn.Pipe()
            options = there, way, args.precision, args.dtype, str(floats), str(folder), torch.get_num_threads()
            process = spawn.Process(target=run, args=options, daemon=True)
            process.start()
            there.close()
            ways[way], logits[way] = here.recv()
            process.join()
    if any(x != next(iter(logits.values())) for x in logits.values()):
        raise RuntimeError("the ways give different logits")
    return result | {"parameters": parameters, "precision": args.precision, "dtype": args.dtype, "ways": ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--layers", type=int, default=22, help="22: 1.1 billion parameters")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the floats as loaded")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    result = measure(args)
    print(f"{result['parameters'] / 1e9:.2f} billion parameters, loaded as {args.dtype}, into {args.precision}; MB")
    print(f"{'':10}{'resident':>10}{'anonymous':>11}{'left':>8}{'ru_maxrss':>11}{'seconds':>9}")
    for way, x in result["ways"].items():
        sizes = (x[f"{name}_bytes"] / 1e6 for name in ("resident", "anonymous", "left", "maxrss"))
        print(f"{way:10}" + "".join(f"{size:{width}.0f}" for size, width in zip(sizes, (10, 11, 8, 11)))
              + f"{x['seconds']:9.1f}")  # fmt: skip
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
