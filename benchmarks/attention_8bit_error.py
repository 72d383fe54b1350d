"""What attention in 8 bits loses: each arithmetic in plain torch, in float64, against float64 on the operands as they were.

python -m benchmarks.attention_8bit_error [--keys 1024 16384 131072] [--models [minilm smollm2 dit]] [--json FILE]

Rounding and scales are those of kernels; sums are exact. So it is what a kernel can reach, before there is one. The formulas of
others are read from their kernels: SageAttention 2.2 on sm_90, FlashAttention-3's fp8, comfy-kitchen 0.2.31 (7d86acf).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench
from forwardpass.common.models.compare import relative_error

E4M3, LARGEST_E4M3 = torch.float8_e4m3fn, 448.0
ROWS = 256
Rounded = tuple[Tensor, Tensor]  #: values that are whole numbers or e4m3, and what they have to be multiplied by


def hadamard(n: int) -> Tensor:
    """[n, n] orthonormal, n a power of two (Sylvester's construction)."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(n)


def rotated(x: Tensor) -> Tensor:
    """Its columns, in blocks of the largest power of two that divides their number, times a Hadamard matrix."""
    n = x.shape[-1] & -x.shape[-1]
    return (x.unflatten(-1, (-1, n)) @ hadamard(n)).flatten(-2)


def to_int8(x: Tensor, largest: Tensor) -> Rounded:
    scale = largest.clamp_min(1e-30) / 127
    return (x / scale).round(), scale


def to_e4m3(x: Tensor, largest: Tensor) -> Rounded:
    scale = largest.clamp_min(1e-30) / LARGEST_E4M3
    return (x / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(E4M3).double(), scale


def by_row(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True)


def by_channel(x: Tensor) -> Tensor:
    return x.abs().amax(0, keepdim=True)


def by_tensor(x: Tensor) -> Tensor:
    return x.abs().amax().reshape(1, 1)


def by_groups(block: int, group_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Rows of a block that share a scale, as they share a thread: group_of(place in the block)."""

    def largest(x: Tensor) -> Tensor:
        place = torch.arange(len(x))
        group = place // block * block + group_of(place % block)
        most = torch.zeros(len(x) + block, dtype=x.dtype).scatter_reduce(0, group, by_row(x).flatten(), "amax")
        return most[group].unsqueeze(-1)

    return largest


def in_order_of_scales(x: Tensor) -> Tensor:
    """Eight rows share a scale, of each 64 those whose largest values are next to one another."""
    blocks = [most.sort(0) for most in by_row(x).squeeze(1).split(64)]
    shared = [
        torch.cat([most[-1:].expand_as(most) for most in ordered.split(8)]).gather(0, places.argsort())
        for ordered, places in blocks
    ]
    return torch.cat(shared).unsqueeze(1)


#: A thread's rows of q, and its columns of a block of 64 keys, in the accumulators of mma.sync.
Q_OF_THREAD = by_groups(32, lambda place: place % 8)
K_OF_THREAD = by_groups(64, lambda place: place % 8 // 2)


@dataclass(frozen=True)
class Arithmetic:
    """How q, k, v and p become 8 bits. `p_block`: keys whose largest p is the unit of p; None: the row's, so far."""

    q: Callable[[Tensor], Rounded]
    k: Callable[[Tensor], Rounded]
    v: Callable[[Tensor], Rounded]
    p: Callable[[Tensor, Tensor], Rounded]
    rotates: bool = False
    centre: Callable[[Tensor], Tensor] | None = None  #: of k, what is subtracted from each key
    block: int = 64
    by_block: bool = False
    sums_rounded: bool = False  #: the denominator is the sum of what was rounded

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [R, D], k [N, D], v [N, D] float64 to [R, D]."""
        scale = 1 / math.sqrt(q.shape[1])
        if self.centre is not None:
            k = k - self.centre(k)
        if self.rotates:
            q, k = rotated(q), rotated(k)
        (q, q_scale), (k, k_scale), (v, v_scale) = self.q(q), self.k(k), self.v(v)
        out, total = q.new_zeros(len(q), v.shape[1]), q.new_zeros(len(q), 1)
        maximum = q.new_full((len(q), 1), -math.inf)
        for begin in range(0, len(k), self.block):
            keys = slice(begin, begin + self.block)
            s = q @ k[keys].T * (q_scale * scale) * (k_scale[keys].T if len(k_scale) > 1 else k_scale)
            new = torch.maximum(maximum, s.amax(1, keepdim=True))
            unit = s.amax(1, keepdim=True) if self.by_block else new
            p = (s - unit).exp()
            rounded, p_scale = self.p(p, p.amax(1, keepdim=True))
            before, now = (maximum - new).exp(), (unit - new).exp()
            part = rounded * p_scale
            total = total * before + (part if self.sums_rounded else p).sum(1, keepdim=True) * now
            out = out * before + part @ v[keys] * now
            maximum = new
        return out / total * v_scale


def _p_as_it_is(p: Tensor, largest: Tensor) -> Rounded:
    return p, p.new_ones(1)


def _p_u8(p: Tensor, largest: Tensor) -> Rounded:
    return (p * 255).round(), p.new_tensor(1 / 255)


def _p_e4m3(p: Tensor, largest: Tensor) -> Rounded:
    return to_e4m3(p, p.new_ones(1, 1))


def _p_fp16(p: Tensor, largest: Tensor) -> Rounded:
    return p.half().double(), p.new_ones(1)


def _fp16(x: Tensor) -> Rounded:
    return x.half().double(), x.new_ones(1, 1)


def mean(k: Tensor) -> Tensor:
    return k.mean(0, keepdim=True)


def kitchens_anchor(k: Tensor) -> Tensor:
    """The one of nine keys that is nearest to the others, if that takes energy away and the largest value grows by an eighth."""
    samples = k[torch.arange(9) * (len(k) - 1) // 8]
    best = samples[(9 * samples - samples.sum(0)).square().sum(1).argmin()].unsqueeze(0)
    rest = samples - best
    helps = rest.square().sum() < samples.square().sum() and rest.abs().max() <= samples.abs().max() * 1.125
    return best if helps else torch.zeros_like(best)


def _int8(largest: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Rounded]:
    return lambda x: to_int8(x, largest(x))


def _e4m3(largest: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Rounded]:
    return lambda x: to_e4m3(x, largest(x))


def _by_block(x: Tensor, largest: float, to_8bit: Callable[[Tensor, Tensor], Rounded]) -> Rounded:
    """By channel, and of 64 keys one factor more for all channels."""
    scale = by_channel(x).clamp_min(1e-30) / largest
    blocks = [to_8bit(keys, keys.abs().amax().reshape(1, 1)) for keys in (x / scale).split(64)]
    return torch.cat([values * factor for values, factor in blocks]), scale


def _int8_by_block(x: Tensor) -> Rounded:
    return _by_block(x, 127, to_int8)


def _e4m3_by_block(x: Tensor) -> Rounded:
    return _by_block(x, LARGEST_E4M3, to_e4m3)


_K = _int8(in_order_of_scales)
ARITHMETICS = {
    "fp16": Arithmetic(_fp16, _fp16, _fp16, _p_fp16),
    "int8": Arithmetic(_int8(by_row), _K, _int8_by_block, _p_u8, rotates=True, centre=mean, by_block=True),
    "fp8": Arithmetic(_int8(by_row), _K, _e4m3(by_channel), _p_e4m3, rotates=True, centre=mean, by_block=True),
    "Sage 2": Arithmetic(_int8(Q_OF_THREAD), _int8(K_OF_THREAD), _e4m3(by_channel), _p_e4m3, centre=mean),
    "FA3 fp8": Arithmetic(_e4m3(by_tensor), _e4m3(by_tensor), _e4m3(by_tensor), _p_e4m3, block=128),
    "kitchen": Arithmetic(
        _int8(Q_OF_THREAD), _int8(K_OF_THREAD), _int8(by_channel), _p_u8, rotates=True, centre=kitchens_anchor, by_block=True,
        sums_rounded=True,
    ),
    # what the int8 and fp8 above are without one of their parts
    "int8, not rotated": Arithmetic(_int8(by_row), _K, _int8_by_block, _p_u8, centre=mean, by_block=True),
    "int8, not centred": Arithmetic(_int8(by_row), _K, _int8_by_block, _p_u8, rotates=True, by_block=True),
    "int8, p by the row": Arithmetic(_int8(by_row), _K, _int8_by_block, _p_u8, rotates=True, centre=mean),
    "int8, p by 128 keys": Arithmetic(
        _int8(by_row), _K, _int8_by_block, _p_u8, rotates=True, centre=mean, by_block=True, block=128
    ),
    "int8, v by channel": Arithmetic(
        _int8(by_row), _K, _int8(by_channel), _p_u8, rotates=True, centre=mean, by_block=True
    ),
    "int8, k by key": Arithmetic(
        _int8(by_row), _int8(by_row), _int8_by_block, _p_u8, rotates=True, centre=mean, by_block=True
    ),
    "int8, k by thread": Arithmetic(
        _int8(by_row), _int8(K_OF_THREAD), _int8_by_block, _p_u8, rotates=True, centre=mean, by_block=True
    ),
    "fp8, p by the row": Arithmetic(_int8(by_row), _K, _e4m3(by_channel), _p_e4m3, rotates=True, centre=mean),
    "fp8, p by 128 keys": Arithmetic(
        _int8(by_row), _K, _e4m3(by_channel), _p_e4m3, rotates=True, centre=mean, by_block=True, block=128
    ),
    "fp8, v by 64 keys too": Arithmetic(
        _int8(by_row), _K, _e4m3_by_block, _p_e4m3, rotates=True, centre=mean, by_block=True
    ),
    "int8 q k, fp16 p v": Arithmetic(_int8(by_row), _K, _fp16, _p_fp16, rotates=True, centre=mean),
}  # fmt: skip


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), -1) @ v


def made_up(kind: str, keys: int, head_dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q [ROWS, D], k and v [keys, D], float64: normal, and as `kind` says."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, head_dim, generator=g, dtype=torch.float64) for n in (ROWS, keys, keys))
    if kind == "outliers":  # of three channels
        for x in (q, k, v):
            x[:, [3, 17, head_dim // 2]] *= 12
    elif kind == "bias":  # each channel of k has a mean of its own, several times what it varies by
        k += 4 * torch.randn(1, head_dim, generator=g, dtype=torch.float64)
    elif kind == "peaked":
        q *= 3
    elif kind == "peak and tail":  # of each row one key has the weight of all others together
        k[:, 0], q[:, 0] = 0, math.sqrt(head_dim)
        k[keys // 3] = 0
        k[keys // 3, 0] = math.log(keys) + 0.5
    return q, k, v


KINDS = ("normal", "outliers", "bias", "peaked", "peak and tail")


def of_text(name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v [B, H, S, D] of each layer of a packaged model, on the texts of the command line."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    from forwardpass.cli import embedding
    from forwardpass.cli.readout import readout_of
    from forwardpass.cli.source import find_model

    captured: list[tuple[Tensor, Tensor, Tensor]] = []

    def capture(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        captured.append((q, k, v))
        return sdpa_attention_forward(module, q, k, v, *args, **options)

    AttentionInterface.register("captured", capture)
    AttentionMaskInterface.register("captured", sdpa_mask)
    source = find_model(name)
    readout = readout_of(source)
    model, tokenizer = embedding.load(source, "cpu", readout.auto)
    model.set_attn_implementation("captured")
    text = " ".join(embedding.builtin_texts()[1])
    limit = 512 if name == "minilm" else 2048
    with torch.inference_mode():
        model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=limit))
    return captured


def of_pictures(name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The same of the diffusion transformer of `benchmarks.dit`, half-way from noise to a picture."""
    from benchmarks import dit

    captured: list[tuple[Tensor, Tensor, Tensor]] = []
    attention = F.scaled_dot_product_attention

    def capture(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        captured.append((q, k, v))
        return attention(q, k, v, *args, **options)

    model, _ = dit.trained()
    layers = len(model.transformer_blocks)  # type: ignore[arg-type]
    with mock.patch.object(F, "scaled_dot_product_attention", capture):
        dit.draw(model, 0)
    middle = dit.STEPS // 2 * layers
    return captured[middle : middle + layers]


#: Models, and what takes their q, k and v.
MODELS = {"minilm": of_text, "smollm2": of_text, "dit": of_pictures}


def of_model(name: str) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """(which head, its q, k, v) of a model: of the first, middle and last layer."""
    captured = MODELS[name](name)
    for layer in (0, len(captured) // 2, len(captured) - 1):
        q, k, v = captured[layer]
        for head in (0, q.shape[1] // 2, q.shape[1] - 1):
            of_keys = head // (q.shape[1] // k.shape[1])
            operands = q[0, head, -ROWS:], k[0, of_keys], v[0, of_keys]
            yield f"{name}, layer {layer}, head {head}", tuple(x.double() for x in operands)  # type: ignore[misc]


def errors(operands: tuple[Tensor, Tensor, Tensor]) -> dict[str, dict[str, float]]:
    expected = exact(*operands)
    result = {}
    for name, arithmetic in ARITHMETICS.items():
        y = arithmetic(*operands)
        cosine = torch.cosine_similarity(y, expected, -1).min().item()
        result[name] = {"nrmse": relative_error(y, expected), "worst_cosine": cosine}
    return result


def main() -> None:
    p = bench.parser(__doc__)
    p.add_argument("--keys", type=int, nargs="*", default=[1024, 16384])
    p.add_argument("--head-dims", type=int, nargs="*", default=[64, 128])
    p.add_argument(
        "--models",
        nargs="*",
        choices=list(MODELS),
        help="also q, k and v of these models' layers, of all where none is named",
    )
    args = p.parse_args()
    result = bench.header("attention-8bit", "cpu", []) | {"results": []}
    print(f"{'':34}" + "".join(f"{name:>21}" for name in ARITHMETICS))

    def add(name: str, operands: tuple[Tensor, Tensor, Tensor]) -> None:
        measured = errors(operands)
        result["results"].append({"operands": name, "errors": measured})
        print(
            f"{name:34}" + "".join(f"{x['nrmse']:>12.4f} {x['worst_cosine']:.6f}" for x in measured.values()),
            flush=True,
        )

    for d in args.head_dims:
        for keys in args.keys:
            for kind in KINDS:
                add(f"{kind}, {keys} keys, {d} columns", made_up(kind, keys, d))
    for model in () if args.models is None else args.models or MODELS:
        for name, operands in of_model(model):
            add(name, operands)
    bench.write(result, args.json)


if __name__ == "__main__":
    main()
