"""Trains a small diffusion transformer on scikit-learn's digits; what precisions do to the pictures that it draws.

    python -m benchmarks.dit [--seconds N] [--weights FILE] [--html FILE] [--json FILE]

The model is diffusers' DiTTransformer2DModel, of 4 layers and 256 channels, which learns to draw one of ten digits of 16 x 16 pixels
by flow matching. It is trained once: its weights are kept in FILE. Each way draws the same pictures, from the same noise in the
same steps. Needs diffusers, scikit-learn and scikit-image.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardpass as fp
from benchmarks import bench

SIZE, STEPS, BATCH, DIGITS = 16, 20, 32, 10
#: Training draws its batches from 0 on; pictures are compared from noise of these seeds, and calibrated with others.
SEEDS, CALIBRATION = range(100, 106), range(200, 204)
WEIGHTS = "build/dit-digits.pt"


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


def train(model: nn.Module, seconds: float) -> int:
    """AdamW, the learning rate down to nothing at the end; how many steps there was time for."""
    pictures, labels = digits()
    generator, began, steps = torch.Generator().manual_seed(0), time.perf_counter(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    model.train()
    while (spent := (time.perf_counter() - began) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (steps + 1) / 50) * (1 + math.cos(math.pi * spent)) / 2
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
        steps += 1
        if steps % 50 == 0:
            print(f"step {steps}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return steps


def trained(weights: str, seconds: float) -> tuple[nn.Module, int]:
    """(the model, in eval mode, the steps it was trained for), from the file where there is one."""
    model, file = build(), pathlib.Path(weights)
    if not file.exists():
        steps = train(model, seconds)
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
