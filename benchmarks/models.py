"""A real model, swapped, beside what else a CPU user could pick: latency and how far its embeddings move.

    python -m benchmarks.models --model minilm --peers eager,torch_dynamic_int8,torchao,onnxruntime,openvino \
        --batch 8,32 --length 128 --json FILE

All candidates are built from the same fp32 model and take turns in one process, each with torch's number of threads.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import forwardpass as fp
from benchmarks import bench
from forwardpass.cli import comparison, embedding
from forwardpass.cli.embedding import Batch
from forwardpass.common.timing import interleave, keep_freed_memory

Run = Callable[[Batch], Tensor]  #: batch -> last hidden states


class Missing(Exception):
    """A peer that cannot be built here, in words."""


def need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise Missing(f"not installed ({e}): pip install {package}") from e


def eager(model: nn.Module, example: Batch, calibration: list[Batch]) -> Run:
    return embedding.hidden_states(model)


def forwardpass(
    model: nn.Module, example: Batch, calibration: list[Batch], precision: str, compiled: bool = False
) -> Run:
    swapped = copy.deepcopy(model)
    fp.swap(swapped, precision=precision, calibrate=calibration if precision == "int8" else None, keep=False)
    return embedding.hidden_states(torch.compile(swapped) if compiled else swapped)


def torch_dynamic_int8(model: nn.Module, example: Batch, calibration: list[Batch]) -> Run:
    quantized, reason = comparison.torch_dynamic_int8(model)
    if quantized is None:
        raise Missing(str(reason))
    return embedding.hidden_states(quantized)


def torchao(model: nn.Module, example: Batch, calibration: list[Batch]) -> Run:
    """W8A8, dynamic per token, compiled: its documentation's way on CPUs."""
    quantization = need("torchao.quantization", "torchao")
    quantized = copy.deepcopy(model)
    quantization.quantize_(quantized, quantization.Int8DynamicActivationInt8WeightConfig())
    return embedding.hidden_states(torch.compile(quantized))


def onnxruntime(model: nn.Module, example: Batch, calibration: list[Batch]) -> Run:
    """Dynamic quantisation of a torch.onnx export; of its settings those that moved MiniLM's embeddings least."""
    ort, quantization = need("onnxruntime", "onnxruntime"), need("onnxruntime.quantization", "onnx onnxruntime")
    need("onnxscript", "onnxscript")
    names = ("input_ids", "attention_mask")
    shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    with tempfile.TemporaryDirectory() as folder:
        exported, quantized = os.path.join(folder, "exported.onnx"), os.path.join(folder, "quantized.onnx")
        torch.onnx.export(
            Hidden(model), tuple(example[n] for n in names), exported, input_names=names, output_names=["hidden"],
            dynamic_shapes={n: shape for n in names}, external_data=False, verbose=False,
        )  # fmt: skip
        quantization.quantize_dynamic(exported, quantized, op_types_to_quantize=["MatMul"], per_channel=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {n: batch[n].numpy() for n in names})[0])


def openvino(model: nn.Module, example: Batch, calibration: list[Batch]) -> Run:
    """8-bit weight compression by nncf; the CPU plugin then quantises activations dynamically."""
    ov, nncf = need("openvino", "openvino"), need("nncf", "nncf")
    names = ("input_ids", "attention_mask")
    converted = ov.convert_model(Hidden(model), example_input=tuple(example[n] for n in names))
    compressed = nncf.compress_weights(converted)  # its default, INT8_ASYM
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = ov.compile_model(compressed, "CPU", settings)
    return lambda batch: torch.from_numpy(compiled([batch[n].numpy() for n in names])[0])


class Hidden(nn.Module):
    """Positional tensors in, last hidden states out: what exporters take."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


PEERS = {
    "eager": eager,
    "forwardpass int8": partial(forwardpass, precision="int8"),
    "forwardpass int8 compiled": partial(forwardpass, precision="int8", compiled=True),
    "forwardpass w8a16": partial(forwardpass, precision="w8a16"),
    "torch_dynamic_int8": torch_dynamic_int8,
    "torchao": torchao,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def build(
    names: list[str], model: nn.Module, example: Batch, calibration: list[Batch]
) -> tuple[dict[str, Run], dict[str, str]]:
    """(peer -> run, peer -> why there is none)."""
    built, missing = {}, {}
    for name in names:
        print(f"building {name}", file=sys.stderr)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                built[name] = PEERS[name](model, example, calibration)
                built[name](example)
        except Missing as e:
            missing[name] = str(e)
        except Exception as e:  # whatever a peer raises is its result; it is shown and the others go on
            missing[name] = f"failed: {type(e).__name__}: {' '.join(str(e).split())[:300]}"
    return built, missing


def main() -> None:
    p = bench.parser(__doc__)
    p.add_argument("--model", default="minilm", help="a folder, minilm, or a hub id")
    p.add_argument(
        "--peers", default=",".join(n for n in PEERS if not n.startswith("forwardpass")), help="comma-separated"
    )
    p.add_argument("--batch", default="8,32", help="comma-separated")
    p.add_argument("--length", type=int, default=128)
    args = p.parse_args()
    names = [n for n in PEERS if n.startswith("forwardpass")] + args.peers.split(",")
    if unknown := [n for n in names if n not in PEERS]:
        p.error(f"unknown peers {', '.join(unknown)}; there are {', '.join(PEERS)}")
    names = ["eager", *(n for n in names if n != "eager")]  # everything is compared with it
    try:
        source = embedding.find_model(args.model)
        model, tokenizer = embedding.load(source, args.device)
    except ValueError as e:
        p.error(str(e))
    calibration_texts, texts = embedding.builtin_texts()
    calibration = embedding.tokenize(tokenizer, calibration_texts, model, args.device)
    batches = embedding.tokenize(tokenizer, texts, model, args.device)
    sizes = [int(b) for b in args.batch.split(",")]
    timed = {b: embedding.full_batch(tokenizer, texts, b, args.length, model, args.device) for b in sizes}

    result = bench.header("models", args.device, ["peers"]) | {"allocator": keep_freed_memory()}
    with torch.inference_mode():
        built, missing = build(names, model, timed[sizes[0]], calibration)
        timings = {
            b: interleave({n: partial(run, batch) for n, run in built.items()}, args.device, rounds=args.rounds)
            for b, batch in timed.items()
        }
        # after the timing, as other lengths make torch.compile replace its graphs
        embeddings = {n: embedding.embed(run, batches) for n, run in built.items()}
    result |= {"model": source.origin, "length": args.length, "texts": len(texts), "not_run": missing}
    result["peers"] = {
        n: {
            "latency_ms": {str(b): timings[b][n].to_json() for b in sizes},
            **embedding.parity(embeddings[n], embeddings["eager"]),
        }
        for n in built
    }
    print(f"{source.origin}; {result['device']['name']}, {torch.get_num_threads()} threads; {len(texts)} texts")
    print(f"{'':<28}{'lowest cosine':>14}" + "".join(f"{f'{b} x {args.length}':>28}" for b in sizes))
    for n, peer in result["peers"].items():
        cells = (f"{t['median']:.1f} ms [{t['low']:.0f}, {t['high']:.0f}]" for t in peer["latency_ms"].values())
        print(f"{n:<28}{peer['cosine_min']:>14.5f}" + "".join(f"{c:>28}" for c in cells))
    for n, why in missing.items():
        print(f"{n:<28}not run: {why}")
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
