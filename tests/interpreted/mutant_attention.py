"""attention's kernels in the mutation suite: an instance of each configuration of tiles, in launches that take every path:
blocks of keys whole and at an edge, more of them than stages, rows without keys, more tiles than blocks, more heads than
run together, packed sequences, caches, every kind of what is added to the scores."""

import torch
from mutant_instances import Instance

from forwardpass.ops.attention.cases import Case
from forwardpass.ops.attention_8bit.cases import GrowingCase, RareCase, of_attention
from forwardpass.ops.attention_decode.cases import Case as OfCache

F16, BF16 = torch.float16, torch.bfloat16
#: cu_seqlens of three sequences of 40 rows and 70 keys
IN_ORDER = (0, 40, 80, 120), (0, 70, 140, 210)


def plain(dtype, dim, below, **every):
    """dim: a bucket's columns; below: fewer. every: options of all cases."""

    def case(sizes, d=dim, **options):
        return Case(sizes, (d, d), dtype, **{"batch": 1, "heads": (1, 1), **every, **options})

    return (
        case((40, 330), below, causal=True, lse=True, sinks="float32", layout="apart"),
        case((150, 90), causal=True, lse=True),  # rows without keys
        case((400, 90), causal=True, lse=True, sinks="float32", batch=2),  # whole tiles of them
        case((40, 700), scale=2.0),  # maxima that grow from block to block
        # clean blocks between others, and none
        case((100, 700), window=(400, 30), lse=True, heads=(4, 2), sinks="dtype", layout="unaligned"),
        case((40, 700), window=(500, 30)),
        case((150, 290), window=(20, 30)),
        case((280, 420), below, packed=True, causal=True, lse=True, heads=(2, 1)),
        case((70, 50), below, packed=True, batch=7, awkward=False),
        case((2, 3), below, packed=True, batch=140, awkward=False),
        case((131, 3), packed=True, batch=140, causal=True, awkward=False),  # several tiles of a block have no keys
        # cu_seqlens that begin elsewhere, fall, and lead beyond the tensors, of rows and of keys; and rows of no sequence
        *(
            case((40, 70), below, packed=True, batch=3, lse=True, sinks="float32", awkward=False, cu_seqlens=starts)
            for starts in (
                ((1, 40, 80, 120), IN_ORDER[1]),
                ((0, 40, 80, 79), IN_ORDER[1]),
                ((0, 40, 80, 121), IN_ORDER[1]),
                ((0, 40, 80, 110), IN_ORDER[1]),
                (IN_ORDER[0], (-5, 70, 140, 210)),
                (IN_ORDER[0], (0, 70, 140, 139)),
                (IN_ORDER[0], (0, 70, 140, 211)),
            )
        ),
        case((40, 70), below, packed=True, batch=3, awkward=False, cu_seqlens=(IN_ORDER[0], (0, 70, 140, 211))),
        # the last sequence has no keys, and in 8 bits v no scales for it
        case((35, 33), packed=True, batch=2, sinks="float32", awkward=False, cu_seqlens=((0, 67, 70), (0, 66, 66))),
        # more heads than run together, in one tile and in two
        case((5, 9), heads=(18, 9), batch=4, lse=True, layout="expanded"),
        case((200, 5), heads=(6, 6), batch=6),
        # of a warp one row sees keys of two blocks: the first of its eighths, the second, ...
        *(case((128, 128 + before), heads=(4, 4), window=(1, 0)) for before in (0, 56, 48, 40)),
    )


def caches(dtype, dim, below, **every):
    """Pages that are parts of a block of keys, and longer ones; lengths out of range, and pages for some rows and for all."""

    def case(lengths, rows, d=dim, **options):
        return OfCache(lengths, rows, d, (2, 2), dtype, **{"lse": True, **every, **options})

    return (
        case((300, 0, 33), 40, below, page=48, sinks="float32"),
        case((300, 330, 50, 90), 40, page=16, seq_lens=(300, 10**6, -1, 90), pages=((0, 17, -1), (3, 1, 99))),
        case((290, 140), 150, page=256, window=100, layout="together"),
        case((200, 140), 70, below, page=None, layout="heads first"),
        case((1100, 40), 40, page=64),  # of which several blocks share the keys, some without any
    )


def packed_heads(dtype, dim, below, **every):
    """Few rows of a cache, all query heads of a kv head being rows of a tile: one tile, several, and parts of the keys."""

    def case(lengths, rows, d=dim, **options):
        return OfCache(lengths, rows, d, (8, 2), dtype, lse=True, **every, **options)

    return (
        case((300, 0, 33), 9, below, page=48, sinks="float32"),
        case((290, 140), 40, page=256, window=100, layout="together"),
        case((1100, 40), 10, page=64, sinks="dtype"),
    )


def general(dtype, dim, below):
    #: a mask's values in blocks clean and not, the last of which lacks one key
    masks = ("bool bhij", "dtype bhij", "float32 bhij", "dtype hj", "bool bj")
    return (
        *(Case((40, 767), (dim, dim), dtype, 2, (2, 1), window=(500, 30), mask=mask) for mask in masks),
        Case((40, 748), (dim, dim), dtype, 1, (2, 1), mask="dtype bhij"),  # rows of it are 8 bytes off 16
        Case((40, 744), (dim, dim), dtype, 1, (2, 1), mask="bool bhij"),
        # rows of a mask that are read 16 bytes at a time, and end in the middle of a block
        Case((40, 712), (dim, dim), dtype, 1, (2, 1), mask="dtype bhij"),
        *(Case((40, 752), (dim, dim), dtype, 1, (2, 1), window=(500, 30), mask=mask) for mask in masks[:3]),
        Case(
            (150, 90), (dim, dim), dtype, 2, (1, 1), softcap=8.0, lse=True, mask="dtype bij", sinks="dtype", alibi="h"
        ),
        Case((40, 700), (dim, dim), dtype, 1, (1, 1), window=(500, 30), softcap=8.0),
        *plain(dtype, dim, below, alibi="bh"),
    )


def config(kind, dtype, dim):
    name = {F16: "f16", BF16: "bf16"}[dtype]
    return f"{kind}AttentionConfig<AttentionInstance{{dtype={name}, head_dim={dim},"


def sm80(dtype, dim, cases):
    return Instance(("sm_80",), config("<Mma", dtype, dim), cases)


def sm90a(dtype, dim, cases):
    return Instance(("sm_90a",), config("<Wgmma", dtype, dim), cases, clusters=2)


def triton(cases):
    return Instance(("sm_80", "sm_90a"), "attention_kernel", cases, "triton")


def rare(dtype, dim, products, **options):
    """Blocks of keys with and without a bound, several of them. The first 41 rows attend to the key that is NaN."""
    case = Case((140, 700), (dim, dim), dtype, 1, (2, 1), window=(300, 30), scale=10.0, lse=True, **options)
    return RareCase(**vars(of_attention(case, True, products)))


def of_8_bits(arch, kind, products, dim, cases, dtype, **every):
    """The launches of 16 bits. Out's dtype is a branch of these kernels, so a few more have it otherwise: packed, several
    sequences, rows of fewer columns. And scores beyond 2^20, and maxima that grow for eight rows of a warp alone."""
    other = {F16: BF16, BF16: F16}[dtype]

    def case(sizes, d, dtype, **options):
        return Case(sizes, (d, d), dtype, **{"batch": 1, "heads": (1, 1), "lse": True, **every, **options})

    more = (
        case((280, 420), dim - 16, other, packed=True, causal=True, sinks="float32", heads=(2, 1)),
        case((150, 90), dim, other, causal=True, batch=2, sinks="dtype", heads=(2, 1)),
        case((40, 70), dim, other, packed=True, batch=3, awkward=False, cu_seqlens=(IN_ORDER[0], (0, 70, 140, 211))),
        *(case((150, 380), dim, dtype, scale=s, causal=s > 1e6) for s in (3e4, 1e7)),
    )
    name = {"int8": "i8", "fp8": "e4m3"}[products]
    kernel = f"<Int8{kind}AttentionConfig<AttentionInstance{{dtype={name}, head_dim={dim},"
    if every:  # score modifiers
        more += (case((40, 90), dim, dtype, packed=True, softcap=8.0, sinks="float32", heads=(2, 1)),)
        more += (case((40, 150), dim, other, mask="dtype bhij"),)
    both = tuple(of_attention(case, n % 2 == 0, products) for n, case in enumerate((*cases, *more)))
    growing = (
        GrowingCase(**vars(of_attention(case((64, 560), dim, dtype, awkward=False, scale=scale), True, products)))
        # Beyond 2^16 and 2^20 as well, where ALiBi's term would be rounded in other units than the reference's.
        for scale in ((None,) if every else (None, 120.0, 1800.0))
    )
    launches = (*both, *growing, rare(dtype, dim, products, **every))
    return Instance((arch,), kernel, launches, clusters=2 * (arch == "sm_90a"))


def of_8_bits_triton(archs, products, cases):
    cases = tuple(of_attention(case, True, products) for case in cases)
    return Instance(archs, "attention_8bit_kernel", cases, "triton")


INSTANCES = {
    "attention_mma_64": sm80(F16, 64, plain(F16, 64, 40)),
    "attention_mma_128": sm80(BF16, 128, plain(BF16, 128, 104)),
    "attention_mma_general": sm80(F16, 64, general(F16, 64, 40)),
    "attention_wgmma_64": sm90a(F16, 64, (*plain(F16, 64, 40), *caches(F16, 64, 40), *packed_heads(F16, 64, 40))),
    "attention_wgmma_128": sm90a(
        BF16, 128, (*plain(BF16, 128, 104), *caches(BF16, 128, 104), *packed_heads(BF16, 128, 104))
    ),
    "attention_wgmma_general": sm90a(
        BF16,
        64,
        (*general(BF16, 64, 40), *caches(BF16, 64, 40, alibi="batch"), *packed_heads(BF16, 64, 40, softcap=8.0)),
    ),
    "attention_8bit_mma_64": of_8_bits("sm_80", "", "int8", 64, plain(F16, 64, 40), F16),
    "attention_8bit_mma_general": of_8_bits("sm_80", "", "int8", 64, general(F16, 64, 40), F16, alibi="h"),
    "attention_8bit_mma_fp8": of_8_bits("sm_89", "", "fp8", 128, plain(BF16, 128, 104), BF16),
    "attention_8bit_wgmma_64": of_8_bits("sm_90a", "Wgmma", "int8", 64, plain(F16, 64, 40), F16),
    "attention_8bit_wgmma_general": of_8_bits("sm_90a", "Wgmma", "int8", 64, general(BF16, 64, 40), BF16, alibi="h"),
    "attention_8bit_wgmma_fp8": of_8_bits("sm_90a", "Wgmma", "fp8", 64, plain(BF16, 64, 40), BF16),
    "attention_8bit_triton": of_8_bits_triton(("sm_80",), "int8", plain(F16, 64, 40)),
    "attention_8bit_triton_general": of_8_bits_triton(("sm_80",), "int8", general(BF16, 64, 40)),
    "attention_8bit_triton_fp8": of_8_bits_triton(("sm_89",), "fp8", plain(BF16, 64, 40)),
    "attention_triton": triton(plain(F16, 64, 40)),
    "attention_triton_general": triton(general(BF16, 64, 40)),
}
