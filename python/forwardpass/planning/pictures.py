"""Pictures that a model draws, before and after a swap: how far apart they look, in PSNR, SSIM and LPIPS."""

from __future__ import annotations

import functools
import importlib.util
import io
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common.batches import Forward, Output, device_of
from ..common.extras import pip_install
from ..common.printing.printed import Block, Gallery
from ..common.printing.text import count

#: images(model, batch): what a caller draws with the model, as `pictures_of` takes it
Images = Callable[[nn.Module, Any], Any]
#: Pictures that a report shows, the worst first.
SHOWN = 4
#: Two drawings of one model are the same where their PSNR is above this, in dB: kernels on a GPU may add up in another order.
REPEATABLE = 50.0
#: The window that SSIM is computed in, in pixels.
_WINDOW = 7


def drawing(images: Images, forward: Forward | None, output: Output | None) -> tuple[Forward, Output]:
    """(forward, output): forward(model, batch) draws, each time from the same state of torch's generators, and output(drawn) is
    `pictures_of`.

    Raises:
        ValueError: scikit-image is not installed, or forward= or output= is given too.
        TypeError: `images` cannot be called.
    """
    if not callable(images):
        raise TypeError(
            f"images= is a function images(model, batch) that returns pictures, not a {type(images).__name__}"
        )
    if forward is not None or output is not None:
        name = "forward" if forward is not None else "output"
        raise ValueError(f"images= says how a batch goes through the model and what is compared, and {name}= says it too: drop "
                         f"{name}=")  # fmt: skip
    if importlib.util.find_spec("skimage") is None:
        raise ValueError(f"PSNR and SSIM of images= need scikit-image: {pip_install('images')}")

    def draw(model: nn.Module, batch: Any) -> Any:
        device = device_of(model)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return images(model, batch)

    return draw, pictures_of


def pictures_of(drawn: Any) -> Tensor:
    """Pictures as float32 [N, C, H, W] in 0..1, on the host.

    Args:
        drawn: floats in 0..1 or uint8: a tensor [N, C, H, W] or [N, H, W], as torch has pictures; an array [N, H, W, C] or
            [N, H, W], as scikit-image has them; or a list of pictures [H, W, C] or [H, W] that numpy reads. C is 1, 3 or 4.

    Raises:
        TypeError, ValueError: it is none of those.
    """
    import numpy as np

    channels_first = isinstance(drawn, Tensor)
    if isinstance(drawn, list | tuple) and drawn and all(isinstance(x, Tensor) for x in drawn):
        raise TypeError("images= returned a list of tensors: return one tensor [N, C, H, W], torch.stack of them")
    if not channels_first:
        array = np.asarray(drawn)
        if array.dtype.kind not in "fu":
            raise TypeError(f"images= returned a {type(drawn).__name__}, which holds no pictures: return a tensor [N, C, H, W], an "
                            "array [N, H, W, C], or a list of pictures, as floats in 0..1 or uint8")  # fmt: skip
        drawn = torch.from_numpy(np.ascontiguousarray(array))
    pictures = drawn.detach().cpu()
    shape = "[N, C, H, W]" if channels_first else "[N, H, W, C]"
    if pictures.dim() == 3:
        pictures = pictures.unsqueeze(1)
    elif pictures.dim() == 4 and not channels_first:
        pictures = pictures.movedim(-1, 1)
    if (
        pictures.dim() != 4
        or pictures.shape[1] not in (1, 3, 4)
        or min(pictures.shape[2:]) < _WINDOW
        or not len(pictures)
    ):
        raise ValueError(f"images= must return pictures {shape} with 1, 3 or 4 channels and at least {_WINDOW} x {_WINDOW} pixels, "
                         f"and returned {list(drawn.shape)}")  # fmt: skip
    if pictures.dtype == torch.uint8:
        return pictures.float() / 255
    if not pictures.is_floating_point():
        raise TypeError(
            f"images= must return floats in 0..1 or uint8, and returned {pictures.dtype}: divide by its largest value"
        )
    pictures = pictures.float()
    low, high = pictures.min().item(), pictures.max().item()
    if low < -1e-3 or high > 1 + 1e-3:  # NaN passes: it shows as an error that is NaN
        raise ValueError(f"images= must return floats in 0..1, and returned {low:.3g}..{high:.3g}: scale and clamp them, as in "
                         "(x / 2 + 0.5).clamp(0, 1) of -1..1")  # fmt: skip
    return pictures.clamp(0, 1)


def refuse_others(expected: Tensor, again: Tensor) -> None:
    """ValueError where one model drew two pictures of one batch: no difference would be the precision's."""
    if expected.shape != again.shape or (lowest := psnr(again, expected).min().item()) < REPEATABLE:
        drew = "other shapes" if expected.shape != again.shape else f"pictures {lowest:.1f} dB apart"
        raise ValueError(f"images= drew {drew} of the same batch with the same model: make its noise from a seed within it, as in "
                         "generator=torch.Generator().manual_seed(0)")  # fmt: skip


def psnr(actual: Tensor, expected: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair of pictures [N, C, H, W] in 0..1, in dB, float64 [N]; infinite where they are equal,
    NaN where a pixel is none."""
    from skimage.metrics import mean_squared_error, peak_signal_noise_ratio

    def of(a: Any, e: Any) -> float:
        return peak_signal_noise_ratio(e, a, data_range=1.0) if mean_squared_error(e, a) else math.inf

    return _each(of, actual, expected)


def ssim(actual: Tensor, expected: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of each pair, in windows of 7 x 7 pixels, float64 [N]; 1 where they are equal."""
    from skimage.metrics import structural_similarity

    return _each(
        functools.partial(structural_similarity, data_range=1.0, win_size=_WINDOW, channel_axis=0), actual, expected
    )


def _each(measure: Callable[[Any, Any], float], actual: Tensor, expected: Tensor) -> Tensor:
    pairs = zip(actual.double().cpu().numpy(), expected.double().cpu().numpy())
    return torch.tensor([float(measure(a, e)) for a, e in pairs], dtype=torch.float64)


@functools.cache
def _lpips() -> Callable[[Tensor, Tensor], Tensor] | str:
    """LPIPS (Zhang et al., 2018) over AlexNet, or why there is none. Nothing is downloaded."""
    if importlib.util.find_spec("lpips") is None:
        return "lpips is not installed"
    if not [*pathlib.Path(torch.hub.get_dir(), "checkpoints").glob("alexnet-*.pth")]:
        return "torchvision's weights of AlexNet are not in torch's hub folder"
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).eval()

    def distance(actual: Tensor, expected: Tensor) -> Tensor:
        three = [t.expand(-1, 3, -1, -1) if t.shape[1] == 1 else t[:, :3] for t in (actual, expected)]
        return network(*three, normalize=True).flatten().double()

    return distance


@dataclass(frozen=True)
class Picture:
    """A picture before and after, float [C, H, W] in 0..1: the `index`-th of batch `batch`."""

    batch: int
    index: int
    psnr: float
    ssim: float
    lpips: float | None
    before: Tensor
    after: Tensor

    def row(self) -> tuple[list[str], list[tuple[bytes, str]]]:
        """(what is said of it, PNG and caption of each column): before, after, and their difference, as bright as it can be."""
        difference = (self.after - self.before).abs()[:3]
        times = 1 / max(difference.max().item(), 1 / 255)
        lines = [f"batch {self.batch}, picture {self.index}", f"PSNR {self.psnr:.2f} dB", f"SSIM {self.ssim:.5f}"]
        return lines + ([] if self.lpips is None else [f"LPIPS {self.lpips:.4f}"]), [
            (_png(self.before), ""),
            (_png(self.after), ""),
            (_png(difference * times), f"times {times:.3g}"),
        ]


@dataclass
class PictureComparison:
    """Errors of pictures against those of the original, of every picture, in the order they were drawn."""

    psnr: list[float] = field(default_factory=list)  #: dB; infinite where two are equal
    ssim: list[float] = field(default_factory=list)
    lpips: list[float] = field(default_factory=list)  #: empty where it cannot be computed
    without_lpips: str | None = None  #: why
    worst: list[Picture] = field(default_factory=list)  #: by PSNR, the lowest first

    def add(self, actual: Tensor, expected: Tensor, batch: int) -> None:
        """Pictures [N, C, H, W] in 0..1 of one batch, whose number is `batch`."""
        values: list[Any] = [psnr(actual, expected).tolist(), ssim(actual, expected).tolist()]
        distance = _lpips()
        if isinstance(distance, str):
            self.without_lpips = distance
        elif self.without_lpips is None:
            try:
                values.append(distance(actual, expected).tolist())
            except RuntimeError as e:  # pictures of fewer pixels than its network takes
                self.without_lpips = " ".join(str(e).split())[:100]
                self.lpips.clear()
        for gathered, more in zip((self.psnr, self.ssim, self.lpips), values):
            gathered += more
        distances = values[2] if values[2:] else [None] * len(actual)
        pairs = zip(values[0], values[1], distances, expected.cpu(), actual.cpu())
        new = [Picture(batch, i, p, s, d, before, after) for i, (p, s, d, before, after) in enumerate(pairs)]
        self.worst = sorted(self.worst + new, key=lambda x: -math.inf if math.isnan(x.psnr) else x.psnr)[:SHOWN]

    def to_json(self) -> dict[str, Any]:
        """NaN and infinity, which JSON has not, are null."""

        def values(numbers: Sequence[float]) -> list[float | None]:
            return [v if math.isfinite(v) else None for v in numbers]

        return {
            "psnr_min": values([_least(self.psnr)])[0],
            "ssim_min": values([_least(self.ssim)])[0],
            "lpips_max": values([-_least([-v for v in self.lpips])])[0] if self.lpips else None,
            "psnr": values(self.psnr),
            "ssim": values(self.ssim),
            "lpips": values(self.lpips),
            "without_lpips": self.without_lpips,
        }

    def blocks(self) -> Iterator[Block]:
        lowest = f"lowest PSNR {_least(self.psnr):.2f} dB, lowest SSIM {_least(self.ssim):.5f}"
        largest = f", largest LPIPS {-_least([-v for v in self.lpips]):.4f}" if self.lpips else ""
        yield f"{count(len(self.psnr), 'picture')}: {lowest}{largest}"
        if self.without_lpips:
            yield f"LPIPS is left out: {self.without_lpips}"
        yield from ("", Gallery(("as it was", "swapped", "difference"), [x.row() for x in self.worst]))


def _least(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else min(values, default=math.nan)


def _png(picture: Tensor) -> bytes:
    """The file of a picture [C, H, W] in 0..1."""
    from PIL import Image

    pixels = (picture.nan_to_num(0) * 255).round().clamp(0, 255).to(torch.uint8).movedim(0, -1)
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1).numpy()).save(file, "PNG")
    return file.getvalue()
