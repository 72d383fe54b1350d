"""int8_conv2d beside plain torch code; with --layers the convolutions of whole networks beside fp32 and other libraries' INT8.

python -m benchmarks.int8_conv2d [--layers resnet50 efficientnet_lite0] [--batch N] [--threads N] [--processor-time] [--json FILE]

With --layers, on a CPU, each distinct layer is timed by itself, outputs in 8 bits as the next layer takes them: `fp32`
(torch, channels_last, ReLU in place), `torch int8` (torch.ao's quantized convolution, its engine for x86), `onnxruntime`
(QLinearConv on channels_last images) and `openvino` (a model of FakeQuantize). All have the same
integers for inputs and weights. A network's sum is of its layers, each as often as it occurs; depthwise ones and the stem are
left out, as `fp.nn` leaves them in floats. --processor-time counts the time of this process on the CPU in place of the clock on
the wall, for a machine that others use too: with one thread alone.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import forwardpass as fp
from benchmarks import bench, eager, tiers
from forwardpass.common import environment
from forwardpass.common.models.compare import finite_relative_error
from forwardpass.common.timing import Timing, interleave, keep_freed_memory
from forwardpass.ops.int8_conv2d import OPERATION

#: Relative L2 error of a peer's dequantised outputs beside fp64: rounding to steps of out_scale is .01 to .02.
SAME_WORK = 3e-2


def baseline(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    **options: Any,
) -> Tensor:
    del options["packed"], options["residual_first"]
    acc = F.conv2d(x.float(), weight.float(), None, stride, padding, dilation, groups).permute(0, 2, 3, 1)
    of_pixels = x_scale.reshape(-1, 1, 1).expand(acc.shape[:-1])
    return eager.dequantize(acc, of_pixels, weight_scale, **options).permute(0, 3, 1, 2)


BASELINES = {OPERATION: baseline}


@dataclass(frozen=True)
class Layer:
    """A convolution of an image of `size` squared, with padding of half a kernel; `count` of them in a network."""

    size: int
    channels: int
    out_channels: int
    kernel: int = 1
    stride: int = 1
    count: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    def macs(self, batch: int) -> int:
        return batch * self.out_size**2 * self.out_channels * self.channels * self.kernel**2

    def __str__(self) -> str:
        stride = f" / {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel} x {self.kernel}{stride}, {self.channels} to {self.out_channels} at {self.size}"


def _resnet50() -> list[Layer]:
    """torchvision's, whose stride is that of the 3 x 3."""
    layers, channels, size = [], 64, 56
    for c, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        layers += [Layer(size, channels, c), Layer(size, c, c, 3, stride), Layer(size, channels, 4 * c, 1, stride)]
        size, channels = size // stride, 4 * c
        layers += [Layer(size, c, channels, count=blocks), Layer(size, channels, c, count=blocks - 1)]
        layers += [Layer(size, c, c, 3, count=blocks - 1)]
    return layers


def _efficientnet_lite0() -> list[Layer]:
    """Its 1 x 1 convolutions: what is between them is depthwise."""
    layers, channels, size = [Layer(112, 32, 16)], 16, 112
    for c, blocks, stride in ((24, 2, 2), (40, 2, 2), (80, 3, 2), (112, 3, 1), (192, 4, 2), (320, 1, 1)):
        layers.append(Layer(size, channels, 6 * channels))
        size //= stride
        layers.append(Layer(size, 6 * channels, c))
        if blocks > 1:
            layers += [Layer(size, c, 6 * c, count=blocks - 1), Layer(size, 6 * c, c, count=blocks - 1)]
        channels = c
    return [*layers, Layer(7, 320, 1280)]


NETWORKS: dict[str, Callable[[], list[Layer]]] = {"resnet50": _resnet50, "efficientnet_lite0": _efficientnet_lite0}


@dataclass(frozen=True)
class Subject:
    """What a layer is made of: x of 0 to 127, as behind a ReLU, so that int8 and uint8 hold the same; a scale for each."""

    layer: Layer
    x: Tensor  # int8, channels_last
    weight: Tensor  # int8, channels_last
    x_scale: float
    weight_scale: Tensor
    bias: Tensor

    @staticmethod
    def of(layer: Layer, batch: int) -> Subject:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(batch, layer.size, layer.size, layer.channels, generator=g).relu().mul(40).clamp(max=127)
        w = torch.randn(layer.out_channels, layer.kernel, layer.kernel, layer.channels, generator=g).mul(32).round()
        x, w = x.round().to(torch.int8).permute(0, 3, 1, 2), w.clamp(-127, 127).to(torch.int8).permute(0, 3, 1, 2)
        weight_scale = (torch.rand(layer.out_channels, generator=g) + 0.5) / (32 * (w[0].numel()) ** 0.5)
        bias = torch.randn(layer.out_channels, generator=g) / 4
        return Subject(layer, x, w, 1 / 40, weight_scale, bias)

    @functools.cached_property
    def exact(self) -> Tensor:
        layer = self.layer
        y = F.conv2d(self.x.double(), self.weight.double(), None, layer.stride, layer.padding)
        scale = (self.weight_scale.double() * self.x_scale)[:, None, None]
        return (y * scale + self.bias.double()[:, None, None]).relu()

    @functools.cached_property
    def out_scale(self) -> float:
        return float(self.exact.amax() / 127)


Run = Callable[[], Tensor]  #: -> outputs, in steps of out_scale where they are integers


def forwardpass_int8(s: Subject) -> Run:
    x_scale, out_scale = torch.tensor([s.x_scale]), torch.tensor([s.out_scale])
    packed = fp.ops.pack_int8_weight(s.weight, verify=False)
    return lambda: fp.ops.int8_conv2d(
        s.x, s.weight, x_scale, s.weight_scale, stride=s.layer.stride, padding=s.layer.padding, bias=s.bias, activation="relu",
        out_dtype=torch.int8, out_scale=out_scale, packed=packed if packed.numel() else None,
    )  # fmt: skip


def torch_fp32(s: Subject) -> Run:
    x, w = s.x.float() * s.x_scale, s.weight.float() * s.weight_scale[:, None, None, None]
    return lambda: F.conv2d(x, w, s.bias, s.layer.stride, s.layer.padding).relu_()


def torch_int8(s: Subject) -> Run:
    torch.backends.quantized.engine = "x86"
    q = torch._make_per_tensor_quantized_tensor(s.x.to(torch.uint8), s.x_scale, 0)
    zeros = torch.zeros(len(s.weight_scale), dtype=torch.int64)
    w = torch._make_per_channel_quantized_tensor(s.weight, s.weight_scale.double(), zeros, 0)
    pairs = ([s.layer.stride] * 2, [s.layer.padding] * 2, [1, 1])
    packed = torch.ops.quantized.conv2d_prepack(w, s.bias, *pairs, 1)
    return lambda: torch.ops.quantized.conv2d_relu(q, packed, s.out_scale, 0).int_repr()


def _initializer(name: str, x: Tensor) -> Any:
    helper = importlib.import_module("onnx.numpy_helper")
    return helper.from_array(x.numpy(), name)


def _parameters(s: Subject) -> list[Any]:
    bias = (s.bias / (s.weight_scale * s.x_scale)).round().to(torch.int32)
    return [
        _initializer("x_scale", torch.tensor(s.x_scale)), _initializer("zero", torch.tensor(0, dtype=torch.uint8)),
        _initializer("w", s.weight.contiguous()), _initializer("weight_scale", s.weight_scale),
        _initializer("w_zero", torch.zeros(len(s.weight_scale), dtype=torch.int8)), _initializer("bias", bias),
        _initializer("out_scale", torch.tensor(s.out_scale)),
    ]  # fmt: skip


def onnxruntime(s: Subject) -> Run:
    """On images in channels_last memory, of which its operator for models with QuantizeLinear makes transposed copies."""
    ort, onnx, helper = (importlib.import_module(n) for n in ("onnxruntime", "onnx", "onnx.helper"))
    names = ["x", "x_scale", "zero", "w", "weight_scale", "w_zero", "out_scale", "zero", "bias"]
    layer, n = s.layer, s.layer.out_size
    node = helper.make_node(
        "QLinearConv", names, ["y"], domain="com.microsoft", channels_last=1, strides=[layer.stride] * 2,
        pads=[layer.padding] * 4, kernel_shape=[layer.kernel] * 2,
    )  # fmt: skip
    x = s.x.permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()
    shapes = {"x": x.shape, "y": (len(x), n, n, layer.out_channels)}
    ends = {name: helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, shape) for name, shape in shapes.items()}
    graph = helper.make_graph([node], "layer", [ends["x"]], [ends["y"]], _parameters(s))
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, {"x": x})[0]).permute(0, 3, 1, 2)


def openvino(s: Subject) -> Run:
    """A model as its quantisation tools make them, of FakeQuantize, which its plugin compiles to an INT8 convolution; images in
    channels_last memory, its own layout for those."""
    ov, ops, np = (importlib.import_module(n) for n in ("openvino", "openvino.opset13", "numpy"))

    def constant(x: Tensor | float) -> Any:
        return ops.constant(np.asarray(x, dtype=np.float32))

    def quantized(x: Any, scale: float, steps: float) -> Any:
        """x / steps to integers of uint8, in units of `scale`."""
        return ops.fake_quantize(x, *(constant(v) for v in (0.0, 255 * steps, 0.0, 255 * scale)), 256)

    layer, given = s.layer, ops.parameter(list(s.x.shape), ov.Type.u8, name="x")
    w = ops.multiply(
        ops.convert(ops.constant(s.weight.contiguous().numpy()), "f32"), constant(s.weight_scale[:, None, None, None])
    )
    geometry = ([layer.stride] * 2, [layer.padding] * 2, [layer.padding] * 2, [1, 1])
    sums = ops.convolution(quantized(ops.convert(given, "f32"), s.x_scale, 1.0), w, *geometry)
    y = ops.relu(ops.add(sums, constant(s.bias[None, :, None, None])))
    layouts = ov.preprocess.PrePostProcessor(ov.Model([ops.convert(quantized(y, 1.0, s.out_scale), "u8")], [given]))
    for end in (layouts.input(), layouts.output()):
        end.tensor().set_layout(ov.Layout("NHWC"))
        end.model().set_layout(ov.Layout("NCHW"))
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(layouts.build(), "CPU", settings)
    kinds = {i["primitiveType"].value for n in compiled.get_runtime_model().get_ops() if (i := n.get_rt_info())
             and i["layerType"].value == "Convolution"}  # fmt: skip
    if not all(kind.endswith("_I8") for kind in kinds):
        raise RuntimeError(f"its convolution is {', '.join(kinds)}, not INT8")
    request = compiled.create_infer_request()
    x = s.x.permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()

    def run() -> Tensor:
        return torch.from_numpy(request.infer({0: x}, share_inputs=True, share_outputs=True)[0]).permute(0, 3, 1, 2)

    return run


CANDIDATES: dict[str, Callable[[Subject], Run]] = {
    "int8": forwardpass_int8,
    "fp32": torch_fp32,
    "torch int8": torch_int8,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def built(s: Subject, missing: dict[str, str]) -> dict[str, Run]:
    """Those that can be built here and do the same work; why the others are not."""
    runs: dict[str, Run] = {}
    for name, build in CANDIDATES.items():
        if name in missing:
            continue
        try:
            run = build(s)
            y = run()
        except (ImportError, RuntimeError) as e:
            if name in ("int8", "fp32"):
                raise
            missing[name] = str(e).splitlines()[0]
            continue
        error = finite_relative_error(y.double() * (1.0 if y.is_floating_point() else s.out_scale), s.exact)
        if error > SAME_WORK:
            raise SystemExit(f"{name} of {s.layer} does other work: relative error {error:.1e}")
        runs[name] = run
    return runs


def processor_times(calls: Mapping[str, Run], rounds: int) -> dict[str, Timing]:
    """As `interleave`, in milliseconds that this process had a processor."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 2):
        for name, call in calls.items():
            call()
            start = time.process_time_ns()
            call()
            samples[name].append((time.process_time_ns() - start) / 1e6)
    return {name: Timing.of(times[2:]) for name, times in samples.items()}


@torch.inference_mode()
def of_layers(args: argparse.Namespace) -> dict[str, Any] | None:
    if not args.layers:
        return None
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.processor_time and torch.get_num_threads() > 1:
        raise SystemExit("--processor-time is for one thread: pass --threads 1")
    if args.tier:
        tiers.hold_to(args.tier)
    result = bench.header("convolutions", "cpu", ["results", "sums"])
    result |= {"allocator": keep_freed_memory(), "threads": torch.get_num_threads(), "tier": environment.cpu_tier(),
               "batch": args.batch, "clock": "processor" if args.processor_time else "wall"}  # fmt: skip
    missing: dict[str, str] = {}
    result["results"], result["sums"] = [], {}
    for network in args.layers:
        sums = {of: dict.fromkeys(CANDIDATES, 0.0) for of in ("median", "low")}
        for layer in NETWORKS[network]():
            runs = built(Subject.of(layer, args.batch), missing)
            timings = (
                processor_times(runs, args.rounds) if args.processor_time else interleave(runs, rounds=args.rounds)
            )
            row = {"network": network, "layer": str(layer), "count": layer.count, "macs": layer.macs(args.batch),
                   "timings": {name: t.to_json() for name, t in timings.items()}}  # fmt: skip
            result["results"].append(row)
            for name, t in timings.items():
                sums["median"][name] += t.median * layer.count
                sums["low"][name] += t.low * layer.count
            fp32 = timings["fp32"].median
            each = "  ".join(f"{name} {t.median:.3f} ms ({fp32 / t.median:.2f})" for name, t in timings.items())
            print(f"{network}, {layer}: {each}", flush=True)
        result["sums"][network] = {of: {n: ms for n, ms in s.items() if n not in missing} for of, s in sums.items()}
        for of, each in result["sums"][network].items():
            text = "  ".join(f"{n} {ms:.2f} ms ({each['fp32'] / ms:.2f})" for n, ms in each.items())
            print(f"{network}, all {sum(layer.count for layer in NETWORKS[network]())}, {of}: {text}", flush=True)
    result["missing"] = missing
    return result


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--layers", nargs="+", choices=NETWORKS, help="networks, whose layers are timed beside peers' INT8")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--threads", type=int, help="torch's own number by default")
    p.add_argument("--tier", choices=tiers.TIERS, help="hold this process to a tier below the machine's")
    p.add_argument("--processor-time", action="store_true", help="in place of the clock on the wall, with one thread")


if __name__ == "__main__":
    bench.main(BASELINES, __doc__, add_options, of_layers)
