"""attention_decode's and append_kv's kernels in the mutation suite. With two multiprocessors a share of the keys has parts of
heads and whole ones, and a head has several parts."""

import dataclasses

import torch
from mutant_instances import Instance

from forwardpass.ops.append_kv.cases import Case as Append
from forwardpass.ops.attention_decode.cases import Case
from forwardpass.ops.common.quantized_rows import E4M3

F16, BF16, I8 = torch.float16, torch.bfloat16, torch.int8
#: more sequences than a warp has lanes, and where their keys begin
LENGTHS, LEFTPADS = tuple(7 * i * i % 90 for i in range(70)), tuple(5 * i % 37 for i in range(70))
#: three of them out of range
SEQ_LENS = (*LENGTHS[:10], -5, *LENGTHS[11:40], 10**6, *LENGTHS[41:])
PADDED = (*LEFTPADS[:37], -1, *LEFTPADS[38:50], -1, *LEFTPADS[51:])


def decode(dtype, **every):
    """every: options of all cases."""

    def case(lengths, dim=64, heads=(2, 2), **options):
        return Case(lengths, dim=dim, heads=heads, dtype=dtype, **{**options, **every})

    both = (
        case((0, 1, 15, 17, 300), heads=(6, 2), rows=2, sinks="float32"),
        case((130, 0, 260), dim=128, page=None, window=70, softcap=8.0, sinks="dtype", scales="head"),
        case((130, 3), dim=48, heads=(2, 1), rows=5, window=9, softcap=3.0, scale=0.3, alibi="head", lse=True),
        case((130, 20), dim=128, heads=(16, 1), rows=3, window=75, sinks="dtype"),
        # several groups of rows, padding on the left of any kind
        case(
            (300, 50, 64, 17),
            dim=48,
            heads=(8, 1),
            rows=5,
            leftpad=(70, 0, 64, 3),
            layout="apart",
            scales="tensor",
            alibi="batch",
            lse=True,
        ),
        case((0, 1700), dim=128, heads=(1, 1), page=None),
        # lengths out of range, one beyond the cache among them, paddings, and pages for some rows and for all
        case(
            (90, 300, 50, 64, 34, 200),
            heads=(2, 1),
            rows=4,
            seq_lens=(90, 300, 337, -1, 34, 200),
            leftpad=(3, -1, 0, 0, 1, 0),
            pages=((1, 7, -1), (4, 2, 99)),
        ),
    )
    return (
        *both,
        *(dataclasses.replace(c, batch_invariant=True) for c in both),
        # parts of more slices than there are stages, whose largest scores grow
        case((2100, 40), heads=(2, 1), rows=3, batch_invariant=True, page=64, scale=1.0),
        case((1900,), heads=(1, 1), page=64, scale=1.0),
        case((4200, 1), heads=(40, 2), window=4150, batch_invariant=True, page=None, sinks="dtype"),
        case(LENGTHS, dim=16, heads=(2, 1), page=23, leftpad=PADDED, seq_lens=SEQ_LENS),
        case(tuple(3 * n for n in LENGTHS), dim=16, heads=(16, 2), rows=3, window=30, leftpad=LEFTPADS),
        case(LENGTHS[:33], dim=16, heads=(24, 1), page=None, window=30),
    )


#: Of int8: a case of fp16 rows, and sinks of theirs, in both ways that keys are divided.
INT8 = (*decode(BF16, cache=I8), *decode(F16, cache=I8)[3:11:7])
#: Of the kernel that combines, which has no types: each of these, heads with more parts than a round has, and two panels.
COMBINE = (
    *decode(F16),
    *decode(BF16, cache=I8)[:3],
    Case((300, 2000), dim=256, heads=(2, 1), dtype=BF16, sinks="dtype", page=None),
    Case((4700,), dim=16, heads=(2, 1), dtype=F16, sinks="dtype"),
    Case(tuple(3 * n for n in LENGTHS), 3, 16, (8, 1), F16, window=170, leftpad=LEFTPADS),
    Case((640,), dim=136, heads=(16, 1), rows=8, dtype=F16, page=None),
    Case((0, 900), dim=208, heads=(2, 1), dtype=BF16, cache=E4M3, scales="head", layout="together", page=16),
)
#: One kernel for all types: each of them and each kind of option.
APPEND = (
    Append((0, 1, 15, 16, 17, 33), 2, dtype=F16, rotary="whole", q_heads=3, norm="qk float32"),
    Append((9, 40), 3, 40, dtype=BF16, page=23, rotary="half float32 one", norm="k", value_dim=24),
    Append((5,), dtype=torch.float32, page=None, layout="apart"),
    Append((3, 20), 5, 40, 1, BF16, I8, rotary="half"),
    Append((3, 20), 1, 40, 1, F16, E4M3, layout="together", q_heads=1, norm="qk"),
    Append((7,), 1, 40, 5, F16, I8, scales="head", page=None),
    Append((7, 2), 2, 200, 1, BF16, I8, rotary="half", q_heads=2, norm="qk"),
    Append(
        (7, 2), 2, 256, 1, BF16, I8, rotary="half", norm="k"
    ),  # the largest in the first of two columns taken together
    Append((7, 2), 2, 200, 1, F16, rotary="half", q_heads=1, norm="qk"),
    Append((7, 2), 2, 40, 1, F16, rotary="half pairs", q_heads=1),
    Append((7, 2), 2, 200, 1, torch.float32, E4M3, rotary="whole", q_heads=2, norm="qk", scales="head"),
)

INSTANCES = {
    "decode_f16": Instance(("sm_80",), "DecodeConfig<f16, 128>", decode(F16), multiprocessors=2),
    "decode_i8": Instance(("sm_90a",), "DecodeConfig<i8, 128>", INT8, multiprocessors=2),
    "combine_decode": Instance(("sm_80",), "combine_decode_kernel", COMBINE, multiprocessors=36),
    "append_kv": Instance(("sm_80",), "append_kv_kernel", APPEND),
}
