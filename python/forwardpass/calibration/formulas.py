"""Post-training calibration of W8A8 linears: the maths, in plain torch.

The layer is y = x W^T + bias, x [M, K], W [N, K]. It runs on two int8 operands:

    x * channel_scale      per token while running (or with one static scale), symmetric or not
    W / channel_scale      symmetric per output channel, +-127

In order, per layer:

    statistics = LayerStatistics(K).update(x, mask)                    # over the calibration batches
    channel_scale = smoothing_scale(statistics, W)
    q, scale = round_weight(W / channel_scale, statistics.scaled(channel_scale).second_moment)

Nothing is tuned per model. Measured on all-MiniLM-L6-v2, its 36 encoder linears quantised, activations asymmetric: the
cosine of pooled embeddings to fp32's over 288 texts, calibrated on 64 others (5059 tokens).

                                          lowest     mean      1 - mean
    symmetric, plain rounding             0.99557   0.99746    25.4e-4
    asymmetric, plain rounding            0.99773   0.99886    11.4e-4
    + SmoothQuant, exponent 0.5           0.99876   0.99941     5.9e-4
    + smoothing_scale                     0.99859   0.99950     5.0e-4
    + SmoothQuant 0.5, compensated        0.99927   0.99961     3.9e-4
    + smoothing_scale, compensated        0.99944   0.99970     3.0e-4    this recipe; other splits 0.99938, 0.99935

The lowest of 288 moves by 1e-4 between equally good recipes and splits, so choices below were made on 1 - mean, or on
the layer's own error. Tried and left out: correcting the bias by the mean error of the output (3.0e-4; lowest the same
on average over 3 splits), and statistics from the inputs that already quantised layers produce (with the correction
2.9e-4, at twice the forward passes).
"""

from __future__ import annotations

import math

import torch

from ..ops.common.rotation import rotate

# Share of the mean diagonal that is added to the second moment before it is inverted. Output error by the weights on 64
# texts not calibrated on, as a share of plain rounding's, geometric mean over 14 MiniLM linears: 0.516 at 0.001, 0.509
# at 0.01, 0.495 at 0.05, 0.497 at 0.2.
DAMPING = 0.05

# Columns rounded before the columns after them are updated in one product. Sets the time, not the result.
BLOCK = 64

# How far a channel's smoothing scale may be from their geometric mean: a channel that whispered during calibration may
# speak later. MiniLM's are all between 0.11 and 10.4.
SMOOTHING_LIMIT = 100.0


class LayerStatistics:
    """What calibration remembers of a layer's input x [..., K]: all fp32, on `device`, 4 (K^2 + 2 K) bytes.

    minimum, maximum    [K]     over the rows; +inf and -inf before the first
    second_moment       [K, K]  mean over the rows of x^T x * K / |x|^2

    (K = 384: 0.6 MB, 1536: 9.5 MB, 4096: 67 MB, 11008: 485 MB.) Every row has the same say in the second moment.
    Unweighted, it is ruled by the few tokens with massive activations, whose outputs the next norm scales down.
    1 - mean of the cosine (288 texts) 3.0e-4; unweighted 3.35e-4.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.rows = 0
        self.minimum = torch.full((features,), math.inf, device=device)
        self.maximum = torch.full((features,), -math.inf, device=device)
        self.second_moment = torch.zeros(features, features, device=device)

    @property
    def absmax(self) -> torch.Tensor:
        """Largest |x| of each channel, fp32 [K]; 0 before the first row."""
        return torch.maximum(self.maximum, -self.minimum).clamp_min(0)

    @torch.no_grad()
    def update(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> LayerStatistics:
        """Adds the rows of x [..., K] of any float dtype; with a bool mask [...], those where it is True."""
        features = len(self.minimum)
        if x.shape[-1] != features:
            raise ValueError(f"x has {x.shape[-1]} channels, these statistics have {features}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise ValueError(f"mask must be bool {tuple(x.shape[:-1])}, is {mask.dtype} {tuple(mask.shape)}")
        x = (x.reshape(-1, features) if mask is None else x[mask]).to(self.minimum.device, torch.float32)
        if len(x) == 0:
            return self
        batch = LayerStatistics.__new__(LayerStatistics)
        batch.rows = len(x)
        batch.minimum, batch.maximum = x.amin(0), x.amax(0)
        # By the peak first, so that no square leaves fp32; a row of zeros stays zero.
        peak = x.abs().amax(1, keepdim=True)
        direction = torch.nn.functional.normalize(x / torch.where(peak > 0, peak, 1), dim=1)
        batch.second_moment = direction.T @ direction * (features / len(x))
        return self.merge(batch)

    @torch.no_grad()
    def merge(self, other: LayerStatistics) -> LayerStatistics:
        """Adds what another pass saw, on whatever device."""
        if other.rows == 0:
            return self
        device = self.minimum.device
        self.rows += other.rows
        self.minimum = torch.minimum(self.minimum, other.minimum.to(device))
        self.maximum = torch.maximum(self.maximum, other.maximum.to(device))
        # A running mean, not a sum: fp32 keeps its digits however many rows there are.
        self.second_moment.lerp_(other.second_moment.to(device), other.rows / self.rows)
        return self

    def is_finite(self) -> bool:
        return bool(self.absmax.isfinite().all() and self.second_moment.isfinite().all())

    @torch.no_grad()
    def scaled(self, channel_scale: torch.Tensor) -> LayerStatistics:
        """The statistics of x * channel_scale [K], all positive. In the second moment rows keep their weight."""
        result = LayerStatistics.__new__(LayerStatistics)
        result.rows = self.rows
        result.minimum, result.maximum = self.minimum * channel_scale, self.maximum * channel_scale
        result.second_moment = self.second_moment * channel_scale * channel_scale[:, None]
        return result


class Largest:
    """What calibration remembers of a convolution's input: the largest magnitude, and how many pixels there were. A window mixes
    pixels, so that one scale is for all."""

    def __init__(self) -> None:
        self.rows = 0
        self.absmax = 0.0

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> None:
        """Adds images x [N, C, H, W], or [C, H, W]."""
        if x.numel():
            self.rows += x.numel() // x.shape[-3]
            largest = x.abs().amax().item()
            self.absmax = largest if math.isnan(largest) else max(self.absmax, largest)

    def is_finite(self) -> bool:
        return math.isfinite(self.absmax)

    def scale(self) -> torch.Tensor:
        """fp32 [1]"""
        return torch.tensor([self.absmax / 127 if self.absmax > 0 else 1.0])


@torch.no_grad()
def rotated_moment(second_moment: torch.Tensor, size: int) -> torch.Tensor:
    """The second moment [K, K] of an x whose columns are rotated, `size` at a time: rows keep their length, and their weight."""
    return rotate(rotate(second_moment, size).T.contiguous(), size)  # the matrix is symmetric


@torch.no_grad()
def smoothing_scale(statistics: LayerStatistics, weight: torch.Tensor) -> torch.Tensor:
    """What x is multiplied and the columns of weight [N, K] are divided by: fp32 [K], geometric mean 1.

        channel_scale[k] ~ sqrt(|weight[:, k]|_2 / rms(x[:, k]))

    SmoothQuant (arXiv 2211.10438, eq. 4) balances the largest values, under an exponent to tune. This minimises the
    output's error instead. Rounding x costs step^2/12 * sum_k |weight_k|^2 / s_k^2, where step^2 grows as
    sum_k rms_k^2 s_k^2; rounding the weight costs the same product with the parts exchanged. By Cauchy-Schwarz both
    are least at s_k^2 = |weight_k| / rms_k, which leaves nothing to tune. On MiniLM the
    summed cost, with each token's true range and each row's true absmax, is 4.6 % above what 150 steps of Adam on the
    scales reach (geometric mean over 36 linears); with maxima, at the best exponents for each linear, 20.6 %.

    A channel without evidence, silent during calibration or without weights, gets 1. Linears that share one quantised
    input pass their weights concatenated along N; for the query, key and value of MiniLM, whose optima differ, that
    costs: 1 - mean 4.0e-4 instead of 3.0e-4.
    """
    rms = statistics.second_moment.diagonal().sqrt()
    norm = weight.to(rms.device, torch.float32).norm(dim=0)
    live = (rms > 0) & (norm > 0)
    log_scale = (norm.log() - rms.log())[live] / 2
    channel_scale = torch.ones_like(rms)
    limit = math.log(SMOOTHING_LIMIT)
    channel_scale[live] = (log_scale - log_scale.mean()).clamp(-limit, limit).exp()
    return channel_scale


@torch.no_grad()
def round_weight(
    weight: torch.Tensor, second_moment: torch.Tensor | None = None, *, damping: float = DAMPING
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K], fp32/fp16/bf16 -> q int8 [N, K] in +-127 and scale fp32 [N]; weight ~ q * scale[:, None].

    scale is the row's absmax / 127, and 1 for a row of zeros. (Searching 0.6 to 1.0 of it per row for the least
    error under H: 1 - mean of the cosine with quantised weights alone 1.36e-4 instead of 1.39e-4.)

    Without a second moment, to nearest. With the input's second moment H [K, K], error-compensated (GPTQ, arXiv
    2210.17323, algorithm 1): columns are rounded one after another, and each one's error is passed to those not yet
    rounded where that lowers tr((W - Q) H (W - Q)^T) most. Columns with much input go first, while there are others
    left to mend them. (Error as under DAMPING: 0.495, in natural order 0.521. With three sweeps of coordinate descent
    behind it 0.480, not worth their code.)

    What a column's error adds to another is a ratio of entries of H's own Cholesky factor, as GPTQ is Babai's nearest
    plane (arXiv 2507.18553): without the inverse of H, whose factor the algorithm of the paper takes. The same integers
    came of four shapes to 768 x 3072, in .28 to .45 of the time.

    Damping makes an H definite that is singular by silent channels or by fewer rows than K. fp64 throughout, since H
    comes with condition numbers of 1e6 and more: 8 (2 K^2 + 3 N K) bytes while it runs. Same inputs, same bits.
    """
    absmax = weight.float().abs().amax(1)
    if not absmax.isfinite().all():
        raise ValueError("weight has values that are infinite or not numbers")
    scale = absmax / 127
    scale = torch.where(scale > 0, scale, 1)
    steps = weight.double() / scale[:, None]
    if second_moment is None:
        return steps.round_().clamp_(-127, 127).to(torch.int8), scale

    # The first to be rounded stands last.
    order = second_moment.diagonal().argsort(descending=True, stable=True).flip(0).to(weight.device)
    hessian = second_moment.to(weight.device, torch.float64)[order][:, order]
    # Where no input was ever anything but zero, the identity, which rounds to nearest.
    mean = hessian.diagonal().mean().item()
    hessian.diagonal().add_(damping * mean if mean > 0 else 1.0)
    compensation = torch.linalg.cholesky(hessian)
    compensation /= compensation.diagonal().clone()  # [i, j]: what column i's error adds to column j, j < i

    errors = steps.T[order].contiguous()  # a row is a column of the weight, and becomes its error
    centres = errors.clone()
    rounded = torch.empty_like(errors, dtype=torch.int8)
    for end in range(len(errors), 0, -BLOCK):
        begin = max(end - BLOCK, 0)
        for i in range(end - 1, begin - 1, -1):
            nearest = centres[i].round().clamp_(-127, 127)
            rounded[i] = nearest
            errors[i] -= nearest
            centres[begin:i].addr_(compensation[i, begin:i], errors[i])
        centres[:begin].addmm_(compensation[begin:end, :begin].T, errors[begin:end])
    return rounded[order.argsort()].T.contiguous(), scale


@torch.no_grad()
def static_scale(statistics: LayerStatistics, symmetric: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for the whole (smoothed) input -> scale fp32 [1], zero_point int32 [1], empty when symmetric.

    x ~ (q - zero_point) * scale, with q in +-127 or, when asymmetric, -128..127 over a range that includes 0. From the
    extremes that calibration saw; an input beyond them saturates. Far coarser than a scale per token: the lowest cosine
    is 0.983 instead of 0.9994 with all of MiniLM's linears asymmetric.
    """
    if symmetric:
        scale = statistics.absmax.max().reshape(1) / 127
        return torch.where(scale > 0, scale, 1), torch.empty(0, dtype=torch.int32, device=scale.device)
    low, high = statistics.minimum.min().clamp_max(0), statistics.maximum.max().clamp_min(0)
    scale = ((high - low) / 255).reshape(1)
    scale = torch.where(scale > 0, scale, 1)
    return scale, (-128 - low / scale).round().clamp(-128, 127).to(torch.int32)
