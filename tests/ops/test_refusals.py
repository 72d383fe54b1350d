"""Every operation refuses an argument of another type, dtype, shape or device in one sentence, which begins with its name; also
where a right call came before, after which the compiled operation alone checks."""

import inspect

import numpy as np
import pytest
import torch

import forwardpass as fp
from forwardpass.ops.decoder_layer import DecoderWeights
from forwardpass.ops.encoder_layer import EncoderWeights, Int8Weight

INT8, E4M3, F32 = torch.int8, torch.float8_e4m3fn, torch.float32


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def rows(dtype, *shape):
    return fp.ops.quantize(torch.ones(shape), dtype)[:2]


A, A_SCALE = rows(INT8, 4, 32)
B, B_SCALE = rows(INT8, 48, 32)
EXPERTS, EXPERTS_SCALE = rows(INT8, 3, 48, 32)
A8, A8_SCALE = rows(E4M3, 4, 32)
B8, B8_SCALE = rows(E4M3, 48, 32)
EXPERTS8, EXPERTS8_SCALE = rows(E4M3, 3, 48, 32)
X, Y, ENDS, ONE = torch.ones(4, 32), torch.ones(4, 48), ints(1, 1, 4), torch.ones(1)
SUM, EXPERTS_SUM = B.sum(1, dtype=torch.int32), EXPERTS.sum(2, dtype=torch.int32)
BIAS = {"bias": torch.ones(48), "activation": "relu"}
OF_EXPERTS = {"offs": ENDS, "bias": torch.ones(3, 48), "activation": "relu"}
SHIFT = {"a_zero_point": ints(0, 0, 0, 0), "b_sum": SUM}
FLOAT = {"out_dtype": F32, "residual": Y, "ada_gate": Y}
SCORES = {"scale": 0.1, "window": (4, 0), "softcap": 0.0, "sinks": torch.ones(4), "batch_invariant": False}
NORM = {"weight": torch.ones(32), "eps": 1e-6, "dtype": INT8, "kind": "layer", "bias": torch.ones(32), "symmetric": True,
        "channel_scale": torch.ones(32)}  # fmt: skip
STATIC = {"scale": ONE, "zero_point": ints(0), "symmetric": False, "channel_scale": torch.ones(32)}
Q, CACHE = torch.ones(2, 1, 4, 8), torch.ones(2, 5, 4, 8)
DECODE = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "seq_lens": ints(3, 2), **SCORES, "leftpad": ints(0, 0),
          "alibi_slopes": torch.ones(2, 4)}  # fmt: skip
ATTENTION = {"q": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 5, 2, 8), "v": torch.ones(2, 5, 2, 8), **SCORES, "causal": True,
             "mask": torch.ones(3, 5, dtype=torch.bool), "alibi_slopes": torch.ones(2, 4)}  # fmt: skip


def images(dtype, *shape):
    return torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


NORMS = (torch.ones(32), None)
ENCODER = EncoderWeights(
    *(Int8Weight(*rows(INT8, *shape)) for shape in (*((32, 32),) * 4, (48, 32), (32, 48))), NORMS, NORMS
)
DECODER = DecoderWeights(
    *(Int8Weight(*rows(INT8, *shape)) for shape in ((96, 32), (32, 32), (48, 32), (32, 48))), NORMS[0], NORMS[0]
)
IMAGES, WINDOWS, ADDED = images(INT8, 2, 8, 5, 6), images(INT8, 16, 8, 3, 2), images(F32, 2, 16, 3, 4)
CALLS = {
    "activation_quantize": {"x": torch.ones(4, 64), "activation": "silu_mul", "dtype": INT8, "group_size": 16, "layout": "halves",
                            "symmetric": True, "channel_scale": torch.ones(32)},
    "add_norm_quantize": {"x": X, "residual": X, **NORM},
    "append_kv": {"k": Q, "v": Q, "k_cache": CACHE, "v_cache": CACHE.clone(), "seq_lens": ints(3, 2), "q": Q,
                  "rotary": (torch.ones(2, 1, 8), torch.ones(2, 1, 8)), "q_norm": torch.ones(8), "k_norm": torch.ones(8),
                  "norm_eps": 1e-6, "interleaved": False},
    "attention": ATTENTION,
    "attention_8bit": {**ATTENTION, "dtype": "int8", "rotate": True},
    "attention_8bit_with_lse": {**ATTENTION, "dtype": "int8", "rotate": True},
    "attention_decode": DECODE,
    "attention_decode_with_lse": DECODE,
    "attention_with_lse": ATTENTION,
    "decoder_layer": {"x": torch.ones(2, 1, 32), "k_caches": [CACHE], "v_caches": [CACHE.clone()], "seq_lens": ints(3, 2),
                      "layers": [DECODER], "heads": 4, "rotary": (torch.ones(2, 1, 8), torch.ones(2, 1, 8)), "eps": 1e-6,
                      "activation": "relu", "scale": 0.5, "leftpad": ints(0, 1)},
    "dequant_activation": {"acc": Y.int(), "a_scale": A_SCALE, "b_scale": B_SCALE, **BIAS, **FLOAT, **SHIFT},
    "encoder_layer": {"x": X, "cu_seqlens": ints(0, 1, 4), "layers": [ENCODER], "heads": 4, "eps": 1e-6, "activation": "gelu",
                      "pre_norm": False, "scale": 0.5, "attention_dtype": F32, "key_lens": ints(1, 2),
                      "score_bias": torch.zeros(4, 3, 3), "rotary": [(torch.ones(4, 8), torch.ones(4, 8))], "windows": [2],
                      "first_norm": True},
    "fp8_gemm": {"a": A8, "b": B8, "a_scale": A8_SCALE, "b_scale": B8_SCALE, **BIAS, **FLOAT},
    "fp8_gemm_quantize": {"a": A8, "b": B8, "a_scale": A8_SCALE, "b_scale": B8_SCALE, **BIAS, "group_size": 128},
    "fp8_grouped_gemm": {"a": A8, "b": EXPERTS8, "a_scale": A8_SCALE, "b_scale": EXPERTS8_SCALE, **OF_EXPERTS, "out_dtype": F32},
    "fp8_linear": {"x": X, "weight": B8, "weight_scale": B8_SCALE, **BIAS, **FLOAT, "scale": ONE, "channel_scale": torch.ones(32)},
    "int8_conv2d": {"x": IMAGES, "weight": WINDOWS, "x_scale": torch.ones(2), "weight_scale": torch.ones(16), "stride": (2, 1),
                    "padding": (1, 0), "dilation": (1, 2), "groups": 1, "bias": torch.zeros(16), "activation": "relu6",
                    "out_dtype": F32, "residual": ADDED, "residual_first": True, "packed": fp.ops.pack_int8_weight(WINDOWS)},
    "int8_gemm": {"a": A, "b": B, "a_scale": A_SCALE, "b_scale": B_SCALE, **BIAS, **FLOAT, **SHIFT},
    "int8_gemm_quantize": {"a": A, "b": B, "a_scale": A_SCALE, "b_scale": B_SCALE, **BIAS, **SHIFT},
    "int8_grouped_gemm": {"a": A, "b": EXPERTS, "a_scale": A_SCALE, "b_scale": EXPERTS_SCALE, **OF_EXPERTS, "out_dtype": F32,
                          "a_zero_point": ints(0, 0, 0, 0), "b_sum": EXPERTS_SUM},
    "int8_linear": {"x": X, "weight": B, "weight_scale": B_SCALE, **BIAS, **FLOAT, **STATIC, "weight_sum": SUM,
                    "packed": fp.ops.pack_int8_weight(B)},
    "interleave_gate_up": {"gate": torch.ones(16, 3), "up": torch.ones(16, 3), "dim": 0},
    "norm_quantize": {"x": X, **NORM, "ada_scale": X, "ada_shift": X},
    "pack_int8_weight": {"weight": B, "verify": True},
    "permute_quantize": {"x": X, "index": torch.zeros(4, 2, dtype=torch.int64), "num_experts": 3, "dtype": INT8, "group_size": 16,
                         "channel_scale": torch.ones(32)},
    "quantize": {"x": X, "dtype": INT8, **STATIC},
    "quantize_attention": {**{name: ATTENTION[name] for name in "qkv"}, "dtype": "int8", "rotate": True},
    "separate_gate_up": {"x": torch.ones(32, 3), "dim": 0, "layout": "halves"},
    "unpermute": {"y": torch.ones(6, 8), "position": torch.zeros(3, 2, dtype=torch.int32), "weights": torch.ones(3, 2)},
    "w8a16_gemm": {"x": X, "weight": B, "weight_scale": B_SCALE, **BIAS, "residual": Y, "ada_gate": Y},
    "w8a16_grouped_gemm": {"x": X, "weight": EXPERTS, "weight_scale": EXPERTS_SCALE, **OF_EXPERTS},
}  # fmt: skip
#: One element for each row of the input, whose shape may be that of the rows, or flat.
FLAT = ("a_scale", "a_zero_point")


def shapes(t):
    """Others of as many elements, and of more."""
    yield tuple(n + 1 for n in t.shape)
    yield (*t.shape, 2)
    if t.numel() > 1:
        yield from (s for s in ((t.numel(), 1), (1, t.numel()), tuple(t.shape[::-1]), (t.numel(),)) if s != t.shape)


def others(op, name, value, required):
    """Values that are wrong in the place of this one."""
    if isinstance(value, torch.Tensor):
        yield from ([1.0], np.ones(3), 0.5) + ((None,) if required else ())
        yield torch.zeros(value.shape, dtype=torch.complex64)
        yield torch.zeros(value.shape, dtype=torch.int16)
        yield value.to("meta")
        yield from (torch.zeros(s).to(value.dtype) for s in shapes(value))
    elif isinstance(value, bool):
        yield from ("yes", 1, None, torch.ones(()))
    elif isinstance(value, int | float):
        yield from ("yes", float("nan"), torch.ones(()), True)
    elif isinstance(value, str):
        yield from ("other", 3, ["relu"]) + ((None,) if required else ())
    elif isinstance(value, torch.dtype):
        yield from (torch.float64, "int8", float)
    elif isinstance(value, tuple):
        yield from (3, value[:1], ("a", "b"), [None])


def is_right(op, name, other):
    """Of what `others` makes, that which is another right value."""
    if op == "separate_gate_up":  # of any dtype, on any device
        return isinstance(other, torch.Tensor)
    if not isinstance(other, torch.Tensor) or other.is_meta or other.is_complex() or other.dtype == torch.int16:
        return False
    if name in FLAT:
        return other.numel() == 4
    free = {  # whose shape nothing else fixes
        ("unpermute", "y"): other.dim() > 1,
        ("pack_int8_weight", "weight"): other.dim() == 2,
        ("w8a16_gemm", "weight_scale"): tuple(other.shape) == (48, 1),  # a group of columns
        ("int8_conv2d", "packed"): other.dtype == INT8,
        ("int8_linear", "packed"): other.dtype == INT8,  # of no form to rely on; not read where weight is
    }
    return free.get((op, name), False) or (name in ("scale", "zero_point") and other.numel() == 1)


@pytest.mark.parametrize("op", CALLS)
def test_refused_in_one_sentence(op):
    function, arguments = getattr(fp.ops, op), CALLS[op]
    parameters = inspect.signature(function).parameters
    function(**arguments)
    for name, value in arguments.items():
        parameter = parameters[name]
        required = parameter.default is parameter.empty and "None" not in parameter.annotation
        for other in others(op, name, value, required):
            if is_right(op, name, other):
                continue
            text = f"{op}({name}={tuple(other.shape) if isinstance(other, torch.Tensor) else other!r})"
            said = error_of(function, arguments | {name: other})
            assert said, f"{text} is not refused"
            assert said.startswith((f"TypeError: {op}", f"ValueError: {op}")) and "\n" not in said, f"{text}: {said}"


def error_of(function, arguments):
    try:
        function(**arguments)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return None


def test_every_operation_is_tried():
    assert sorted(CALLS) == sorted(fp.ops.__all__)


def test_errors_name_the_arguments_of_the_call():
    for call, name in (
        (lambda: fp.ops.int8_linear(X, B, B_SCALE.double()), "weight_scale"),
        (lambda: fp.ops.int8_linear(X, B, B_SCALE, symmetric=False, weight_sum=SUM.long()), "weight_sum"),
        (lambda: fp.ops.fp8_linear(X, B8, B8_SCALE.double()), "weight_scale"),
        (lambda: fp.ops.w8a16_gemm(X, B, B_SCALE.double()), "weight_scale"),
    ):
        with pytest.raises(TypeError, match=rf"^\w+: {name} must be a tensor of torch\.\w+, not torch\.\w+$"):
            call()
