"""Whole convolutional networks on a CPU in int8: `fp.swap` beside torch's, onnxruntime's and OpenVINO's own quantisation.

python -m benchmarks.convolution_peers --json FILE [--minutes N] [--networks …] [--candidates …] [--images N] [--threads N]

All are made from one fp32 model and calibrated on the same pictures. A network's time is that of one picture of 224 x 224; all
candidates take turns. With --threads 1 it is processor time, which a loaded machine disturbs less. The share of pictures whose best
class is the fp32 model's is over other crops of the same photographs. EfficientNet-Lite0 and MobileNetV2 have real weights
(packages that `benchmarks.convolution_models` names); ResNets have random ones, no share, and few pictures. Each peer that cannot
be built says why.

The file is written after each network. The same command reads it, measures the networks that are not in it, and prints all. A file
of another commit, machine or option is refused.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import pathlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import forwardpass as fp
from benchmarks import bench
from benchmarks.convolution_models import efficientnet_lite0, mobilenet_v2, photographs
from benchmarks.int8_conv2d import processor_times
from forwardpass.common import environment
from forwardpass.common.timing import interleave

Run = Callable[[Tensor], Tensor]
#: Pictures of a network of random weights, which has no share to be measured.
UNTRAINED_PICTURES = 8
LEAST_ROUNDS = 5
HALF, IMAGENET = ([0.498] * 3, [0.502] * 3), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Network:
    """How a network is made, by what mean and deviation its pictures are scaled, and whether its weights are trained."""

    make: Callable[[], nn.Module]
    scaling: tuple[list[float], list[float]]
    trained: bool


def _resnet(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = getattr(importlib.import_module("torchvision").models, name)()
        return model

    return make


NETWORKS = {
    "resnet50": Network(_resnet("resnet50"), IMAGENET, False),
    "resnet18": Network(_resnet("resnet18"), IMAGENET, False),
    "efficientnet_lite0": Network(efficientnet_lite0, HALF, True),
    "mobilenet_v2": Network(mobilenet_v2, IMAGENET, True),
}


@dataclass(frozen=True)
class Subject:
    """A model in fp32, and the pictures that candidates are calibrated with, one after another."""

    model: nn.Module
    calibration: list[Tensor]


def _channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def fp32(s: Subject) -> Run:
    return _channels_last(copy.deepcopy(s.model))


def forwardpass_int8(s: Subject) -> Run:
    model = _channels_last(copy.deepcopy(s.model))
    fp.swap(model, "int8", calibrate=s.calibration, keep=False)
    return model


def torch_int8(s: Subject) -> Run:
    """Post-training quantisation by FX, in the configuration for x86."""
    torch.backends.quantized.engine = "x86"
    quantisation, fx = (importlib.import_module(f"torch.ao.quantization{x}") for x in ("", ".quantize_fx"))
    mapping = quantisation.get_default_qconfig_mapping("x86")
    prepared = fx.prepare_fx(copy.deepcopy(s.model), mapping, (s.calibration[0],))
    for x in s.calibration:
        prepared(x)
    return _channels_last(fx.convert_fx(prepared))


def onnxruntime_int8(s: Subject) -> Run:
    """Static, weights per channel: its own tools on an export of torch's."""
    ort, quantisation = (importlib.import_module(f"onnxruntime{x}") for x in ("", ".quantization"))
    waiting = iter([{"x": x.numpy()} for x in s.calibration])
    reader = type("Reader", (quantisation.CalibrationDataReader,), {"get_next": lambda self: next(waiting, None)})()
    with tempfile.TemporaryDirectory() as folder:
        exported, file = (str(pathlib.Path(folder) / name) for name in ("fp32.onnx", "int8.onnx"))
        torch.onnx.export(
            s.model, (s.calibration[0],), exported, input_names=["x"], dynamic_axes={"x": {0: "n"}}, dynamo=False
        )
        quantisation.quantize_static(exported, file, reader, per_channel=True)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.force_spinning_stop", "1"
        )  # its threads would slow the next candidate
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.contiguous().numpy()})[0])


def openvino_int8(s: Subject) -> Run:
    """Static, by nncf with its defaults."""
    ov, nncf = importlib.import_module("openvino"), importlib.import_module("nncf")
    model = ov.convert_model(s.model, example_input=s.calibration[0])
    pictures = nncf.Dataset(s.calibration, lambda x: x.numpy())
    quantized = nncf.quantize(model, pictures, subset_size=len(s.calibration))
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(quantized, "CPU", settings).create_infer_request()
    return lambda x: torch.from_numpy(request.infer({0: x.contiguous().numpy()})[0]).clone()


CANDIDATES: dict[str, Callable[[Subject], Run]] = {
    "fp32": fp32,
    "int8": forwardpass_int8,
    "torch int8": torch_int8,
    "onnxruntime int8": onnxruntime_int8,
    "openvino int8": openvino_int8,
}


def built(s: Subject, names: list[str], missing: dict[str, str]) -> Iterator[tuple[str, Run]]:
    """Those that can be built here; why the others are not."""
    for name in names:
        try:
            run = CANDIDATES[name](s)
            run(s.calibration[0])
        except Exception as e:  # whatever another library raises
            if name in ("fp32", "int8"):
                raise
            missing[name] = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"
        else:
            yield name, run


def measure(network: Network, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """seconds: what it may take. Rounds are left out for it, down to LEAST_ROUNDS."""
    start = time.perf_counter()
    pictures, others = photographs(*network.scaling)
    images = args.images if network.trained else min(args.images, UNTRAINED_PICTURES)
    pictures, calibration = pictures[:images], others[:: max(1, len(others) // images)]
    missing: dict[str, str] = {}
    names = [name for name in CANDIDATES if name == "fp32" or name in args.candidates]
    runs = dict(built(Subject(network.make().eval(), [x[None] for x in calibration]), names, missing))
    logits = {name: torch.cat([run(x[None]) for x in pictures]) for name, run in runs.items()}
    x = pictures[:1].contiguous(memory_format=torch.channels_last)
    calls = {name: lambda run=run: run(x) for name, run in runs.items()}
    before = time.perf_counter()
    for call in calls.values():
        call()
    now = time.perf_counter()
    fitting = (start + seconds - now) / (2 * (now - before))  # each sample begins with an untimed call
    rounds = min(args.rounds, max(LEAST_ROUNDS, int(fitting)))
    timings = processor_times(calls, rounds) if args.threads == 1 else interleave(calls, rounds=rounds)
    best = logits["fp32"].argmax(1)
    rows = {
        name: {
            **timings[name].to_json(),
            "same_best_class": (y.argmax(1) == best).float().mean().item() if network.trained else None,
            "relative_error": ((y - logits["fp32"]).norm() / logits["fp32"].norm()).item(),
        }
        for name, y in logits.items()
    }
    return {"images": len(pictures), "calibrated_on": len(calibration), "candidates": rows, "missing": missing}


def lines(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    fp32 = result["candidates"]["fp32"]["median"]
    for candidate, row in result["candidates"].items():
        same = "" if row["same_best_class"] is None else f", same best class {row['same_best_class']:.4f}"
        yield (f"{name}, {candidate}: {row['median']:.2f} ms ({fp32 / row['median']:.2f}), least {row['low']:.2f}"
               f"{same}, relative error {row['relative_error']:.4f}")  # fmt: skip
    yield from (f"{name}, {candidate}: {why}" for candidate, why in result["missing"].items())


def started(args: argparse.Namespace) -> dict[str, Any]:
    """The result of these options: what their file has of it, else without networks. SystemExit where the file is of others."""
    result = bench.header("convolution_peers", "cpu", ["networks"])
    result |= {
        "threads": args.threads,
        "tier": environment.cpu_tier(),
        "candidates": args.candidates,
        "images": args.images,
    }
    if args.json and pathlib.Path(args.json).is_file():
        earlier: dict[str, Any] = json.loads(pathlib.Path(args.json).read_text())
        if other := [key for key, value in result.items() if earlier.get(key) != value]:
            raise SystemExit(
                f"{args.json} was measured with another {', '.join(other)}: name another file, or delete it"
            )
        return earlier
    return result | {"networks": {}}


@torch.inference_mode()
def main() -> None:
    p = bench.parser(__doc__)
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    p.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    p.add_argument("--images", type=int, default=112, help="to compare on, at most; about as many others calibrate")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: one per core")
    p.add_argument(
        "--minutes", type=float, default=20, help="what all networks may take together; rounds are left out for it"
    )
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    end = time.monotonic() + 60 * args.minutes
    result = started(args)
    for i, name in enumerate(args.networks):
        if name not in result["networks"]:
            seconds = (end - time.monotonic()) / (len(args.networks) - i)
            result["networks"][name] = measure(NETWORKS[name], args, seconds)
            bench.write(result, args.json)
        print(*lines(name, result["networks"][name]), sep="\n", flush=True)


if __name__ == "__main__":
    main()
