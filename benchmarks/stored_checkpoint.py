"""An 8-bit checkpoint as it is stored, run by forwardpass and by transformers: seconds to load, memory, tokens a second.

    python -m benchmarks.stored_checkpoint [--model smollm2] [--preset W8A8] [--prompt 128] [--rounds 5] [--json FILE]

compressed-tensors writes the folder (its own rounding to nearest). Each of the two has a process of its own, in which nothing else
was loaded; they take turns. transformers decompresses such a checkpoint on a CPU, to the dtype of the model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pathlib
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import bench
from forwardpass.common.timing import keep_freed_memory

CANDIDATES = ("forwardpass", "transformers")


def write(folder: pathlib.Path, model_name: str, preset: str, dtype: torch.dtype) -> int:
    """Bytes of the weights that compressed-tensors wrote."""
    import compressed_tensors.quantization as ct
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    from forwardpass.cli import embedding
    from forwardpass.cli.readout import NextTokens
    from forwardpass.cli.source import find_model

    model, _ = embedding.load(find_model(model_name), "cpu", NextTokens.auto)
    model = model.to(dtype)
    scheme = ct.preset_name_to_scheme(preset, ["Linear"])
    ct.apply_quantization_config(model, ct.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for m in model.modules():
        args = getattr(getattr(m, "quantization_scheme", None), "weights", None)
        if args is not None:
            dims = 1 if args.strategy == "channel" else (0, 1)
            scale, zero = calculate_qparams(m.weight.float().amin(dims), m.weight.float().amax(dims), args)
            m.weight_scale.data.copy_(scale.reshape(m.weight_scale.shape))
            m.weight_zero_point.data.copy_(zero.reshape(m.weight_zero_point.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder, state_dict=model.state_dict())
    compressor.update_config(folder)
    return (folder / "model.safetensors").stat().st_size


def memory(entry: str) -> int:
    """Bytes, of an entry of /proc/self/status: VmRSS, or VmHWM, its highest since that was reset. (ru_maxrss begins at what the
    process had that this one was forked from.)"""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition(f"{entry}:")[2].split()[0]) << 10


def serve(connection: Connection, name: str, folder: str, prompt: int, steps: int, threads: int) -> None:
    """Loads, says what that took, and answers each request with the seconds of a prefill and of the steps."""
    torch.set_num_threads(threads)
    import transformers

    import forwardpass as fp

    # The class, and all that it imports, before memory is read.
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM._model_mapping[type(config)]
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, began = memory("VmRSS"), time.monotonic()
    model: Any
    if name == "forwardpass":
        model = fp.load_pretrained(folder)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    loading = memory("VmHWM") - before
    ids = torch.arange(1, prompt + 1)[None]
    with torch.inference_mode():
        logits = model(input_ids=ids).logits  # transformers decompresses here
        first = time.monotonic() - began, loading, memory("VmHWM") - before, logits[0, -1].float().tolist()
        connection.send(first)
        keep_freed_memory()  # not before: it takes memory
        while connection.recv():
            began = time.monotonic()
            output = model(input_ids=ids, use_cache=True)
            cache = "cache" if "cache" in output else "past_key_values"  # by the version of transformers
            middle = time.monotonic()
            for _ in range(steps):
                token = output.logits[:, -1:].argmax(-1)
                output = model(input_ids=token, **{cache: output[cache]}, use_cache=True)
            connection.send((middle - began, time.monotonic() - middle))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    result = bench.header("stored_checkpoint", "cpu", ["candidates"])
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        size = write(folder, args.model, args.preset, getattr(torch, args.dtype))
        pipes, loaded = {}, {}
        for candidate in CANDIDATES:
            here, there = spawn.Pipe()
            options = there, candidate, name, args.prompt, args.steps, torch.get_num_threads()
            spawn.Process(target=serve, args=options, daemon=True).start()
            there.close()
            pipes[candidate], loaded[candidate] = here, here.recv()
        times: dict[str, list[tuple[float, float]]] = {candidate: [] for candidate in CANDIDATES}
        for _ in range(args.rounds + 1):
            for candidate, pipe in pipes.items():
                pipe.send(True)
                times[candidate].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(False)
    logits = [torch.tensor(x[3]) for x in loaded.values()]
    candidates = {}
    for candidate, rounds in times.items():
        prefill, decode = zip(*rounds[1:])
        candidates[candidate] = {
            "load_s": loaded[candidate][0],
            "load_bytes": loaded[candidate][1],
            "first_call_bytes": loaded[candidate][2],
            "prefill_tokens_per_s": sorted(args.prompt / s for s in prefill),
            "decode_tokens_per_s": sorted(args.steps / s for s in decode),
        }
    return result | {
        "model": args.model, "preset": args.preset, "dtype": args.dtype, "prompt": args.prompt, "steps": args.steps,
        "file_bytes": size, "candidates": candidates,
        "logits_cosine": torch.cosine_similarity(logits[0], logits[1], dim=0).item(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--preset", default="W8A8", help="of compressed-tensors")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    result = measure(args)
    print(f"{args.model} in {args.preset}, {args.dtype}, {result['file_bytes'] / 1e6:.0f} MB; cosine of logits "
          f"{result['logits_cosine']:.5f}")  # fmt: skip
    print(f"{'':14}{'load, s':>9}{'peak, MB':>10}{'with a call':>13}{'prefill/s':>11}{'decode/s':>10}")
    for name, c in result["candidates"].items():
        rates = (statistics.median(c[f"{phase}_tokens_per_s"]) for phase in ("prefill", "decode"))
        peaks = f"{c['load_bytes'] / 1e6:10.0f}{c['first_call_bytes'] / 1e6:13.0f}"
        print(f"{name:14}{c['load_s']:9.1f}{peaks}" + "".join(f"{r:11.1f}" for r in rates))
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
