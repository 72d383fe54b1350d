"""Modules refuse what they cannot compute in one sentence, and round nothing that they were not asked to."""

import pytest
import torch
from torch import nn

import forwardpass as fp

LINEAR, X, ONE = nn.Linear(64, 32), torch.ones(2, 64), torch.ones(1)
Int8Linear, Fp8Linear, MLP, GatedMLP, Experts = (
    fp.nn.Int8Linear,
    fp.nn.Fp8Linear,
    fp.nn.MLP,
    fp.nn.GatedMLP,
    fp.nn.Experts,
)


def int8(**options):
    return fp.nn.Int8Linear.from_torch(LINEAR, **options)


def fp8(**options):
    return fp.nn.Fp8Linear.from_torch(LINEAR, **options)


def bf16(x):
    return fp.nn.Bf16Linear.from_torch(nn.Linear(64, 32, bias=False))(x)


def layer(inputs, outputs, activation=None):
    return fp.nn.Int8Linear.from_torch(nn.Linear(inputs, outputs), activation=activation)


def experts(index, tokens=3, kind="w8a16"):
    return Experts(4, 64, 32, kind=kind, activation="silu_mul")(torch.ones(tokens, 64), index, torch.ones(3, 2))


REFUSALS = [
    (lambda: int8(channel_scale=[1.0] * 64), TypeError, r"channel_scale must be a tensor \[64\], not list"),
    (lambda: int8(channel_scale=torch.ones(64, 1)), ValueError, r"64 elements in one dimension, and has shape \(64, 1\)"),
    (lambda: fp8(input_scale=0.1), TypeError, r"input_scale must be a tensor \[1\], not float"),
    (lambda: int8(bias=[0.0] * 32), TypeError, r"bias must be a tensor \[32\], not list"),
    (lambda: int8(input_scale=ONE, input_zero_point=torch.ones(2).int()), ValueError, "must have 1 elements"),
    (lambda: int8(input_scale=ONE, input_zero_point=ONE / 2), TypeError, "must be int32, not torch.float32"),
    (lambda: int8(symmetric="no"), TypeError, "symmetric must be True or False, not 'no'"),
    (lambda: int8(quantized=(torch.ones(32, 64, dtype=torch.int8), torch.ones(32).double())), ValueError,
     r"float32 \[32\], not torch.int8 \[32, 64\] and torch.float64 \[32\]"),
    (lambda: bf16(X.double()), TypeError, "x must be float32, .* not torch.float64"),
    (lambda: bf16(X.int()), TypeError, "x must be float32, .* not torch.int32"),
    (lambda: MLP.from_layers(LINEAR, layer(32, 8)), TypeError, "up must be a quantised layer, .* not a Linear"),
    (lambda: MLP.from_layers(layer(64, 32, "gelu"), nn.Linear(32, 8)), TypeError, "down must be a quantised layer"),
    (lambda: GatedMLP.from_layers(LINEAR, LINEAR, LINEAR), TypeError, "gate must be a quantised layer"),
    (lambda: GatedMLP.from_layers(layer(64, 12, "silu"), layer(64, 12), layer(12, 8)), ValueError, "multiple of 8 .* 12 and 12"),
    (lambda: GatedMLP.from_layers(layer(64, 16, "silu"), layer(64, 16, "silu"), layer(16, 8)), ValueError, "up must have no"),
    (lambda: fp.nn.MultiheadAttention(63, 4), ValueError, "embed_dim must be a multiple of num_heads, and they are 63 and 4"),
    (lambda: Experts(4, 64, 12, kind="int8", activation="silu_mul"), ValueError, "must be a multiple of 8, and is 12"),
    (lambda: Experts(513, 16, 16, kind="int8"), ValueError, "must be from 1 to 512, and is 513"),
    (lambda: experts(torch.zeros(3, 2)), TypeError, "must be int32 or int64, not torch.float32"),
    (lambda: experts(torch.zeros(3, 2).long(), tokens=4), ValueError, "a row for each of 4 tokens, and has 3"),
    (lambda: experts(torch.zeros(3, 2), kind="int8"), TypeError, "must be a tensor of torch.int32 or torch.int64"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "sentence"), REFUSALS)
def test_refused_in_one_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence) as refusal:
        call()
    assert "\n" not in str(refusal.value)
