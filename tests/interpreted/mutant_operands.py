"""attention_8bit's operands in the mutation suite: the kernels that quantise q, k and v, and those that bring AttentionOperands
into the layout of the products and back."""

import dataclasses
import itertools
import math

import torch
from mutant_attention import IN_ORDER
from mutant_instances import Instance

from forwardpass.ops.attention_8bit import cases, reference

F16, BF16 = torch.float16, torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Case(cases.Case):
    """`given`: the call has the operands in 8 bits; `returned`: it is quantize_attention. `extremes`: rows and channels of zeros,
    of numbers too small for a scale, with an infinity and with a NaN; a key with one, in the first sequence. `alone`: the largest
    value of v in a block of keys is in one place, in each block elsewhere; the channels' are in the first block."""

    given: bool = False
    returned: bool = False
    extremes: bool = False
    alone: bool = False

    @property
    def op(self):
        return "quantize_attention" if self.returned else super().op

    def arguments(self, device="cpu", seed=0):
        q, k, v, products, rotates, *options = super().arguments(device, seed)
        if self.extremes:
            tiny = 2.0**-110 if q.dtype is BF16 else 0.0
            q[:, 0], q[:, 1], q[:, 2, 0, 5], q[:, 3, 0, 6] = 0.0, tiny, math.inf, math.nan
            v[..., 0], v[..., 1], v[:, 5, :, 2], v[:, 6, :, 3] = 0.0, tiny, math.inf, math.nan
            k[0, 7, :, 1] = math.nan
        if self.alone:
            v *= 0.01
            v[:, 0] = 8.0
            blocks = itertools.product(range(len(v)), range(v.shape[2]), range(1, v.shape[1] // reference.BLOCK))
            for n, (b, head, block) in enumerate(blocks):
                v[b, block * reference.BLOCK + 16 * n % 64 + n % 16, head, n // 4 % 8 + 8 * (n % 9)] = 4.0
        cu_seqlens = options[-3:-1]
        if self.returned:
            return q, k, v, products, rotates, *cu_seqlens
        if not self.given:
            return q, k, v, products, rotates, *options
        q8, q_scale, q_shift, k8, k_scale, v8, v_scale, of_block = reference.quantize_attention(
            q, k, v, products, rotates, *cu_seqlens
        )
        of_block = of_block if products == "int8" else None
        return q8, k8, v8, products, rotates, *options, q_scale, q_shift, k_scale, v_scale, of_block, q.dtype


def assert_matches(actual, args):
    if isinstance(args[-1], torch.dtype):  # of operands that were given
        expected = reference.attention_8bit(*args).double()
        difference = (actual - expected).nan_to_num()
        assert torch.equal(actual.isnan(), expected.isnan())
        assert difference.norm() <= 2 * cases.CLOSE[args[3]] * expected.nan_to_num().norm()
    elif isinstance(actual, tuple):
        expected = reference.quantize_attention(*args)
        for b, (rows, keys) in enumerate(reference.sequences_of(args[0], args[1], *args[-2:])):
            places = (rows, rows, rows, keys, keys, keys, b, keys)[: 8 if args[3] == "int8" else 7]
            x, y = ([part[where].float() for part, where in zip(parts, places)] for parts in (actual, expected))
            for n in (1, 2, 4, 6, *range(7, len(places))):  # k's scales have 22 bits; shifts are sums in another order
                torch.testing.assert_close(x[n], y[n], rtol=1e-4, atol=1e-3, equal_nan=True)
            # of a scale that is NaN: any integers
            for n, scale in ((0, y[1][..., None]), (3, y[4][..., None]), (5, y[6])):
                assert torch.equal(*(torch.where(scale.isnan(), 0, z[n]) for z in (x, y)))
    else:
        cases.assert_matches(actual, args)


def of_dims(sizes, dims, dtype=F16, products="int8", **options):
    return Case(sizes, dims, dtype, **{"products": products, "batch": 1, "heads": (1, 1), **options})


def packed(dims, dtype, products, **options):
    """Sequences that begin elsewhere, fall, and lead beyond the tensors; several of a block of keys, and without any."""
    starts = (IN_ORDER[0], (0, 70, 140, 211)), ((0, 40, 80, 110), IN_ORDER[1]), ((0, 40, 80, 79), IN_ORDER[1])
    return (
        of_dims((70, 150), dims, dtype, products, packed=True, heads=(4, 2), **options),
        *(
            of_dims((40, 70), dims, dtype, products, packed=True, batch=3, awkward=False, cu_seqlens=s, **options)
            for s in starts
        ),
        of_dims((2, 3), dims, dtype, products, packed=True, batch=140, awkward=False, **options),
    )


def quantised(*products):
    """Of all dtypes and numbers of columns; chunks of v's keys, several a thread; rotated in whole and in parts."""
    for n, product in enumerate(products):
        one, other = ((F16, BF16), (BF16, F16))[n % 2]
        yield of_dims((70, 300), (64, 64), one, product, batch=2, heads=(4, 2), layout="apart", extremes=True)
        yield of_dims((70, 300), (40, 40), other, product, batch=2, heads=(4, 2), layout="expanded", rotates=False)
        yield of_dims((9, 150), (128, 128), one, product, heads=(2, 1))
        yield of_dims((9, 90), (200, 200), other, product, heads=(1, 1), extremes=True)
        yield of_dims((3, 2500), (64, 64), other, product)
        yield of_dims((5, 3), (64, 64), one, product, heads=(2, 2), batch=3)
        yield of_dims((5, 13), (64, 64), one, product)
        yield from packed((64, 64), one, product)


def quantised_by_triton(dims, dtype, product, keys=130):
    """Of one kernel: dtypes, products, numbers of columns and, of k and v, of chunks, are constants of Triton's."""
    options = {"returned": True}
    yield of_dims((70, keys), dims, dtype, product, batch=2, heads=(4, 2), layout="apart", extremes=True, **options)
    yield of_dims((70, keys), dims, dtype, product, batch=2, heads=(4, 2), layout="expanded", **options)
    yield of_dims((5, keys // 64 * 64), dims, dtype, product, batch=4, heads=(2, 2), alone=True, **options)
    yield of_dims((2, 3), dims, dtype, product, packed=True, batch=140, awkward=False, **options)
    starts = (
        ((0, 30, 71, 76), (0, keys + 9, keys + 9, 3 * keys)),
        (IN_ORDER[0], (0, keys, 2 * keys, 3 * keys + 1)),
        ((0, 40, 80, 110), (0, keys, keys - 30, 3 * keys)),
        ((0, 40, 80, 79), (0, keys, 2 * keys, 3 * keys)),
    )
    for s in starts:
        batch = {"packed": True, "batch": 3, "heads": (2, 1), "awkward": False, "cu_seqlens": s}
        yield of_dims((40, keys), dims, dtype, product, **batch, **options)


def exchanged(**options):
    for product, dtype in (("int8", F16), ("fp8", BF16)):
        yield of_dims((70, 150), (64, 64), dtype, product, batch=2, heads=(4, 2), **options)
        yield of_dims((70, 90), (40, 40), dtype, product, heads=(2, 1), **options)
        yield of_dims((60, 90), (256, 256), dtype, product, **options)
        yield of_dims((60, 90), (256, 256), dtype, product, packed=True, **options)
        yield from packed((40, 40), dtype, product, **options)


def cuda(kernel, cases):
    return Instance(("sm_90a",), kernel, tuple(cases))


def triton(arch, kernel, product, keys, **options):
    """72 columns fill neither the 96 of the products nor the 128 that a program has."""
    return Instance((arch,), kernel, tuple(quantised_by_triton((72, 72), F16, product, keys)), "triton", **options)


#: Which sequence a block is of the other kernels find likewise. In launches of this one's PTX sequences have hundreds of keys, and
#: so many of them that finding one takes two turns would be 54 thousand.
_OF_KEYS = {"files": ("python/forwardpass/ops/attention_8bit/triton_operands.py",)}


INSTANCES = {
    "attention_8bit_statistics": cuda("qkv_statistics_kernel", quantised("int8", "fp8")),
    "attention_8bit_quantize": cuda("qkv_to_int8_kernel", quantised("int8", "fp8")),
    "attention_8bit_given": cuda("exchange_operands_kernel<true>", exchanged(given=True)),
    "attention_8bit_returned": cuda("exchange_operands_kernel<false>", exchanged(returned=True)),
    "attention_8bit_statistics_triton": triton("sm_80", "statistics_kernel", "int8", 300),
    "attention_8bit_quantize_q_triton": triton("sm_80", "quantize_q_kernel", "int8", 130),
    "attention_8bit_quantize_kv_triton": triton("sm_80", "quantize_kv_kernel", "int8", 400, **_OF_KEYS),
    "attention_8bit_quantize_kv_triton_fp8": triton("sm_89", "quantize_kv_kernel", "fp8", 400, **_OF_KEYS),
}
