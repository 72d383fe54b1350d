"""Trains a small diffusion transformer on scikit-learn's digits; what precisions do to the pictures that it draws.

    python -m benchmarks.dit [--training-steps N] [--weights FILE] [--html FILE] [--json FILE]

The model is diffusers' DiTTransformer2DModel, of 4 layers and 256 channels. It learns to draw one of ten digits, of 16 x 16 pixels,
by flow matching. It is trained once: its weights are kept in FILE. Each way draws the same pictures, from the same noise in the
same steps. Needs diffusers, scikit-learn and scikit-image.
"""

from __future__ import annotations

import math
import pathlib
import sys
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardpass as fp
from benchmarks import bench
from forwardpass.planning.criterion import samples
from forwardpass.planning.parity import Comparison
from forwardpass.planning.pictures import PictureComparison

SIZE, STEPS, BATCH, DIGITS = 16, 20, 32, 10
TRAINING_STEPS = 500
#: Training draws its batches from 0 on; pictures are compared from noise of these seeds, and calibrated with others.
SEEDS, CALIBRATION = range(100, 104), range(200, 204)
WEIGHTS = "build/dit-digits.pt"
#: What the model is swapped for, and what the attention that it calls runs on, if anything.
WAYS: dict[str, tuple[dict[str, Any] | None, str | None]] = {
    "bf16": ({"precision": "bf16"}, None),
    "w8a16": ({"precision": "w8a16"}, None),
    "int8": ({"precision": "int8"}, None),
    "int8_rotated": ({"precision": "int8_rotated"}, None),
    "int8, calibrated": ({"precision": "int8", "calibrate": CALIBRATION}, None),
    "int8_rotated, calibrated": ({"precision": "int8_rotated", "calibrate": CALIBRATION}, None),
    "fp8": ({"precision": "fp8"}, None),
    "8-bit attention": (None, "int8"),
    "int8, 8-bit attention": ({"precision": "int8"}, "int8"),
    "int8_rotated, 8-bit attention": ({"precision": "int8_rotated"}, "int8"),
}


def build(layers: int = 4, heads: int = 4) -> nn.Module:
    """Heads of 64 channels; random weights."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=64, num_layers=layers, in_channels=1, out_channels=1, sample_size=SIZE,
        patch_size=2, num_embeds_ada_norm=DIGITS, norm_num_groups=1,
    )  # fmt: skip


def digits() -> tuple[Tensor, Tensor]:
    """(pictures [1797, 1, 16, 16] in -1..1, the digit of each)"""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    large = F.interpolate(small, size=(SIZE, SIZE), mode="bicubic", align_corners=False).clamp(-1, 1)
    return large, torch.from_numpy(data.target).long()


def velocity(model: Any, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Where the model says that pictures x at times t [N] in 0..1 go to."""
    return model(x, timestep=t * 1000, class_labels=labels).sample


def train(model: nn.Module, steps: int) -> None:
    """AdamW, the learning rate down to nothing at the end."""
    pictures, labels = digits()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = torch.randint(len(pictures), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, 1, SIZE, SIZE, generator=generator)
        t = torch.rand(BATCH, generator=generator)
        at = t.view(-1, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            moved = velocity(model, noise.lerp(pictures[chosen], at), t, labels[chosen])
        loss = F.mse_loss(moved.float(), pictures[chosen] - noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}", file=sys.stderr, flush=True)


def trained(weights: str = WEIGHTS, steps: int = TRAINING_STEPS) -> tuple[nn.Module, int]:
    """(the model, in eval mode, the steps it was trained for), from the file where there is one."""
    model, file = build(), pathlib.Path(weights)
    if not file.exists():
        train(model, steps)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"steps": steps, "model": model.state_dict()}, file)
    content = torch.load(file, weights_only=True)
    model.load_state_dict(content["model"])
    return model.eval().requires_grad_(False), content["steps"]


@torch.inference_mode()
def draw(model: nn.Module, seed: int, steps: int = STEPS) -> Tensor:
    """One picture of each digit, [10, 1, 16, 16] in 0..1, from the noise of a seed in equal steps."""
    x = torch.randn(DIGITS, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(DIGITS)
    for i in range(steps):
        x = x + velocity(model, x, torch.full((DIGITS,), i / steps), labels) / steps
    return (x / 2 + 0.5).clamp(0, 1)


def compared(model: nn.Module, way: str, references: dict[int, Tensor]) -> dict[str, Any]:
    """The pictures that the model draws in one of WAYS, beside its own."""
    options, attention = WAYS[way]
    pictures, output, layers = PictureComparison(), Comparison(), 0
    with ExitStack() as stack:
        if options is not None:
            layers = len(stack.enter_context(fp.swap(model, forward=draw, **options)).swapped)
        if attention is not None:
            stack.enter_context(fp.sdpa(attention, crossover=0))
        for seed, expected in references.items():
            actual = draw(model, seed)
            pictures.add(actual, expected, seed)
            output.add(samples(actual, None), samples(expected, None))
    least = {name: pictures.to_json()[name] for name in ("psnr_min", "ssim_min", "lpips_max", "without_lpips")}
    mean = sum(pictures.psnr) / len(pictures.psnr)
    return {"way": way, "layers": layers, **least, "psnr_mean": mean, "cosine_min": output.cosine_min}


def main() -> None:
    p = bench.parser(__doc__)
    p.add_argument("--training-steps", type=int, default=TRAINING_STEPS, help="where there are no weights yet")
    p.add_argument("--weights", metavar="FILE", default=WEIGHTS, help=f"where they are kept; default: {WEIGHTS}")
    p.add_argument("--html", metavar="FILE", help="also write the report of fp.parity in int8")
    p.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    args = p.parse_args()
    model, steps = trained(args.weights, args.training_steps)
    result = bench.header("dit", "cpu", ["results"])
    result |= {"training_steps": steps, "steps": STEPS, "seeds": list(SEEDS), "results": []}
    references = {seed: draw(model, seed) for seed in SEEDS}
    print(f"{len(SEEDS) * DIGITS} pictures: {'lowest PSNR':>24}{'mean':>8}{'lowest SSIM':>14}{'lowest cosine':>16}")
    for way in args.only:
        row = compared(model, way, references)
        result["results"].append(row)
        print(
            f"{way:32}{row['psnr_min']:>7.2f}{row['psnr_mean']:>8.2f}{row['ssim_min']:>14.4f}{row['cosine_min']:>16.6f}"
        )
        bench.write(result, args.json)
    if args.html:
        with fp.swap(model, "int8"):
            fp.parity(model, SEEDS, images=draw).save_html(args.html)


if __name__ == "__main__":
    main()
