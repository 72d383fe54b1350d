"""attention_8bit's kernels, as compiled: every case of both operations on each architecture, and the integers they multiply."""

import ctypes
import pathlib
import subprocess

import mutant_attention
import pytest
import torch
from every_backend import on_each
from named_options import attention_8bit_arguments
from rotation import paired
from tensor_cores import tensor_core_product

import forwardpass as fp
from forwardpass import dispatch
from forwardpass.dispatch.interpreted import KERNELS
from forwardpass.ops.attention import bucket
from forwardpass.ops.attention_8bit import cases, reference
from forwardpass.testing import assert_equal

pytestmark = [pytest.mark.interpreted, pytest.mark.usefixtures("poisoned")]

ARCHES = {"int8": ("sm_80", "sm_90a", "sm_89", "sm_120"), "fp8": ("sm_89", "sm_90a", "sm_120")}
#: one for each kernel
KERNELS_OF = [("int8", "sm_80"), ("int8", "sm_90a"), ("fp8", "sm_89"), ("fp8", "sm_90a")]
on_each_kernel = pytest.mark.parametrize(("dtype", "arch"), KERNELS_OF)


def cases_of(products):
    return [c for c in cases.cases(products) if c.dtype != torch.float32 and bucket(*c.dims)]


INT8 = cases_of("int8")
REFUSED = [c for c in cases.cases() if c not in INT8]


#: those that take every path of attention's kernels: tiles at edges, maxima that grow, cu_seqlens that are wrong
def paths(products):
    kernels = (torch.float16, 64, 40), (torch.bfloat16, 128, 72), (torch.float16, 256, 192)
    both = [
        cases.of_attention(case, n % 2 == 0, products)
        for kernel in kernels
        for n, case in enumerate((*mutant_attention.plain(*kernel), *mutant_attention.general(*kernel)))
    ]
    return both + [mutant_attention.rare(dtype, dim, products) for dtype, dim, _ in kernels]


def run(arch, op, args, seed=0, **options):
    with fp.interpret(arch, seed=seed, **options) as device, fp.use_backend("cuda"):
        got = dispatch.operations[op](*args)
    assert device.findings == []
    return got


def with_lse(arch, q, k, v, truncating=False, **options):
    """attention_8bit_with_lse by the names of its options."""
    args = attention_8bit_arguments(q, k, v, **options)
    return run(arch, "attention_8bit_with_lse", args, truncating=truncating), args


@pytest.mark.parametrize(
    ("case", "arch"),
    on_each(ARCHES["int8"], cases_of("int8") + paths("int8"), 16, slow=("sm_89", "sm_120"))
    + on_each(ARCHES["fp8"], cases_of("fp8") + paths("fp8"), 16, slow=("sm_120",)),
)
def test_kernel(case, arch, seed):
    args = case.arguments(seed=seed)
    cases.assert_matches(run(arch, case.op, args, seed, guard=True), args)


def test_what_no_kernel_takes_is_refused():
    with fp.interpret("sm_80"), fp.use_backend("cuda"):
        for case in REFUSED:
            args = case.arguments()
            with pytest.raises(fp.Unsupported):
                dispatch.operations[case.op](*args)


def test_where_e4m3_is_refused():
    q = torch.randn(1, 3, 2, 64).half()
    refused = pytest.raises(fp.Unsupported, match=r'from sm_89 on.*use dtype="int8"')
    with fp.interpret("sm_80"), fp.use_backend("cuda"), refused:
        fp.ops.attention_8bit(q, q, q, dtype="fp8")


class Call(ctypes.Structure):
    """Case of int8_operands.cpp."""

    _fields_ = [(n, ctypes.c_void_p) for n in ("q", "k", "v", "out", "workspace", "cu_seqlens_q", "cu_seqlens_k")] + [
        (n, ctypes.c_int64)
        for n in (
            "batch",
            "rows",
            "keys",
            "heads",
            "kv_heads",
            "head_dim",
            "value_dim",
            "is_bf16",
            "fp8",
            "rotates",
            "arch",
        )
    ]


@pytest.fixture(scope="module")
def operands(tmp_path_factory):
    """q, k and v as the kernels quantise them: operands(q, k, v, rotates, starts, products, arch)."""
    if not KERNELS.exists():
        pytest.skip("built without kernels for the interpreter")
    here = pathlib.Path(__file__).parent
    library = tmp_path_factory.mktemp("int8") / "int8_operands.so"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{here.parents[1] / 'csrc'}"]
    subprocess.run([*command, str(here / "int8_operands.cpp"), "-o", str(library)], check=True)
    quantized = ctypes.CDLL(str(library)).quantized
    quantized.restype = ctypes.c_int64
    return lambda *args: dumped(quantized, *args)


INTERPRETED_STREAM = 2


def dumped(quantized, q, k, v, rotates, starts, products="int8", arch="sm_80"):
    """The workspace's (q, q_scale, shift, k, k_scale, v, v_scale, v_block_scale) of one call, in memory that only the kernels have
    written, but keys in their order. An int8 v is unsigned there, 128 more, and its blocks' scales are 2^109 times as large."""
    from gpuless.operators import Operator

    varlen = starts is not None
    out = torch.full((*q.shape[:-1], v.shape[-1]), torch.nan, dtype=q.dtype)
    call = Call(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), None, *(s.data_ptr() for s in starts or ()),
        **{"batch": len(starts[0]) - 1 if varlen else len(q), "rows": q.shape[-3], "keys": k.shape[-3],
           "heads": q.shape[-2], "kv_heads": k.shape[-2], "head_dim": q.shape[-1], "value_dim": v.shape[-1],
           "is_bf16": q.dtype == torch.bfloat16, "fp8": products == "fp8", "rotates": rotates, "arch": int(arch[3:].rstrip("a"))},
    )  # fmt: skip
    places = (ctypes.c_int64 * 10)()
    library = str(KERNELS).encode()

    def launch(*_):
        return quantized(library, ctypes.c_void_p(INTERPRETED_STREAM), ctypes.byref(call), places)

    names = ("q", "k", "v", "out", "workspace", *(("cu_seqlens_q", "cu_seqlens_k") if varlen else ()))
    operator = Operator("attention_8bit", names, launch, frozenset({"out", "workspace"}))
    with fp.interpret(arch) as device:
        size = launch()
        workspace = torch.full((size,), -86, dtype=torch.int8)
        call.workspace = workspace.data_ptr()
        assert device.call(operator, launch, [q, k, v, out, workspace, *(starts or ())]) == size
    assert device.findings == []
    columns, values, blocks = places[7:]
    hk = k.shape[-2]
    rows = q.shape[-2] * (q.shape[0] if varlen else q.shape[0] * q.shape[1])

    def part(i, shape, dtype):
        count = torch.Size(shape).numel()
        return workspace[places[i] : places[i] + count * dtype.itemsize].view(dtype).reshape(shape)

    is_unsigned = products == "int8"
    v8 = in_order(part(5, (hk, blocks, values, 64), torch.int8))
    scales = part(4, (hk, blocks, 92), torch.float32)
    # Without modifiers keys are in the order of their scales, and eight that a thread of attention has share one.
    key = scales[..., 76:].contiguous().view(torch.uint8).long()
    is_grouped = key.sort(-1).values.eq(torch.arange(64)).all(-1, keepdim=True)
    group = torch.tensor([j // 32 * 4 + j % 8 // 2 for j in range(64)])
    k_scale = scales[..., :64] * torch.where(is_grouped, scales[..., 68:76][..., group], 1)
    place = torch.where(is_grouped, key, torch.arange(64)).argsort(-1)

    def by_key(x):  # [hk, blocks, 64, ...]
        return x.take_along_dim(place.reshape(*place.shape, *(1,) * (x.dim() - 3)), 2).flatten(1, 2)

    return (
        part(0, (rows, columns), torch.int8),
        part(1, (rows,), torch.float32),
        part(2, (rows,), torch.float32),
        by_key(part(3, (hk, blocks, 64, columns), torch.int8)),
        by_key(k_scale),
        by_key(v8.bitwise_xor(-128) if is_unsigned else v8),
        part(6, (call.batch, hk, values), torch.float32),
        scales[..., 64] * (2.0**-109 if is_unsigned else 1),
    )


def in_order(v):
    """v [.., blocks, columns, 64] of the workspace as [.., blocks, 64, columns]: byte i of word w is of this place."""
    places = torch.tensor([w // 4 * 16 + i // 2 * 8 + w % 4 * 2 + i % 2 for w in range(16) for i in range(4)])
    return v[..., places.argsort()].transpose(-1, -2)


def assert_quantized_as_the_reference(operands, q, k, v, rotates, starts, products="int8", arch="sm_80"):
    """The integers and e4m3 bit for bit, and scales; columns, keys and rows beyond those that there are: zeros."""
    q8, q_scale, shift, k8, k_scale, v8, v_scale, v_block_scale = operands(q, k, v, rotates, starts, products, arch)
    v8 = v8.view(torch.float8_e4m3fn).float() if products == "fp8" else v8
    (h, d), dv, varlen = q.shape[-2:], v.shape[-1], starts is not None
    for b in range(len(v_scale)):
        if varlen:
            (q0, q1), (k0, k1) = ((int(s[b]), int(s[b + 1])) for s in starts)
            of_q, of_k, of_v, first = q[q0:q1], k[k0:k1], v[k0:k1], (k0 // 64 + b) * 64
            mine = lambda x: x.reshape(h, len(q), *x.shape[1:])[:, q0:q1]  # noqa: B023, E731
        else:
            of_q, of_k, of_v, first = q[b], k[b], v[b], b * -(-k.shape[1] // 64) * 64
            mine = lambda x: x.reshape(len(q), h, q.shape[1], *x.shape[1:])[b]  # noqa: B023, E731
        expected = reference.quantize(of_q, of_k, of_v, rotates, products)
        n, end = len(of_k), first + -(-len(of_k) // 64) * 64
        if len(of_q):
            assert torch.equal(mine(q8)[..., :d].float(), expected.q)
            assert torch.equal(mine(q_scale), expected.q_scale[..., 0])
            torch.testing.assert_close(mine(shift), expected.shift[..., 0], rtol=1e-4, atol=1e-4)
            assert not mine(q8)[..., d:].any()
        if n:
            assert torch.equal(k8[:, first : first + n, :d].float(), expected.k)
            torch.testing.assert_close(k_scale[:, first : first + n], expected.k_scale[..., 0], rtol=2**-22, atol=0)
            assert torch.equal(v8[:, first : first + n, :dv].float(), expected.v)
            assert torch.equal(v_scale[b, :, :dv], expected.v_scale[:, 0])
            if products == "int8":
                assert torch.equal(v_block_scale[:, first // 64 : end // 64], expected.v_block_scale[:, ::64, 0])
            assert not k8[:, first:end, d:].any() and not k8[:, first + n : end].any()
            assert not v8[:, first:end, dv:].any() and not v8[:, first + n : end].any()
    assert not k_scale.view(torch.int32).bitwise_and(3)[..., first:end].any()  # 22 bits


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("dims", "dtype"),
    paired(
        [(64, 64), (40, 40), (96, 96), (128, 128), (192, 128), (256, 256), (72, 72)], [torch.float16, torch.bfloat16]
    ),
)
@pytest.mark.parametrize(
    ("rotates", "products", "arch"),
    [
        (True, "int8", "sm_80"),
        (False, "int8", "sm_80"),
        (True, "int8", "sm_90a"),
        *((True, "fp8", a) for a in ARCHES["fp8"]),
    ],
)
def test_integers(operands, dims, dtype, rotates, products, arch, seed):
    case = cases.Case((70, 600), dims, dtype, batch=2, heads=(4, 2), rotates=rotates)
    q, k, v, *_ = (x.contiguous() if isinstance(x, torch.Tensor) else x for x in case.arguments(seed=seed))
    q[0, 3], k[1, 5], v[0, :, 1, 7] = 0, k[1, 6], 0  # rows and channels of zeros
    assert_quantized_as_the_reference(operands, q, k, v, rotates, None, products, arch)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_integers_of_packed_sequences(operands, arch, seed):
    lengths = ((130, 300), (0, 64), (1, 257), (127, 127), (128, 65), (5, 0), (200, 64), (0, 0), (66, 191))
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in zip(*lengths)]
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(int(s[-1]), h, 64, generator=g).half() for s, h in zip((*starts, starts[1]), (4, 2, 2)))
    assert_quantized_as_the_reference(operands, q, k, v, True, starts, "int8", arch)


@pytest.mark.every(2)
@on_each_kernel
def test_a_sequence_has_its_bits_whatever_is_beside_it(dtype, arch):
    """Each in a batch, packed, and alone; with NaN in a neighbour."""
    lengths = ((130, 300), (1, 257), (127, 127), (66, 191))
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in zip(*lengths)]
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(int(s[-1]), h, 64, generator=g).half() for s, h in zip((*starts, starts[1]), (4, 2, 2)))
    k[starts[1][1] + 3, 1, 5] = torch.nan
    (o, lse), _ = with_lse(arch, q, k, v, dtype=dtype, causal=True, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])
    for b in range(len(lengths)):
        rows, keys = (slice(int(s[b]), int(s[b + 1])) for s in starts)
        (alone, alone_lse), _ = with_lse(arch, q[None, rows], k[None, keys], v[None, keys], dtype=dtype, causal=True)
        assert_equal(o[rows], alone[0], f"o of {b}")
        assert_equal(lse[:, rows].contiguous(), alone_lse[0], f"lse of {b}")
        assert bool(o[rows].isnan().any()) == (b == 1)


@on_each_kernel
def test_rows_without_keys(dtype, arch):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64, generator=g).half() for n in (200, 150, 150))
    sinks = torch.tensor([1.5, -torch.inf])
    for options in (
        {"causal": True},  # the first fifty rows stand before all keys
        {"mask": torch.arange(200).ge(50).reshape(200, 1)},
        {"mask": torch.where(torch.arange(200) < 50, torch.finfo(torch.float32).min, 0.0).reshape(200, 1)},
    ):
        (o, lse), _ = with_lse(arch, q, k, v, dtype=dtype, **options)
        assert not o[:, :50].any() and o[:, 50:].any(-1).all()
        assert lse[:, :, :50].isneginf().all() and lse[:, :, 50:].isfinite().all()
        (o, lse), _ = with_lse(arch, q, k, v, dtype=dtype, sinks=sinks, **options)
        assert not o[:, :50].any() and o[:, 50:].any(-1).all()
        assert lse[0, 0, :50].tolist() == pytest.approx([1.5] * 50) and lse[0, 1, :50].isneginf().all()


@on_each_kernel
def test_rows_far_below_zero(dtype, arch):
    """Scores of -2.3e38 are nearly the lowest float in units of log2(e), with which maxima begin; they are scores nevertheless."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64, generator=g).half() for n in (40, 150, 150))
    mask = torch.zeros(40, 150)
    mask[:10], mask[10:20, :100], mask[20:30, 70:] = -2.3e38, -torch.inf, -2.3e38
    (o, lse), args = with_lse(arch, q, k, v, dtype=dtype, mask=mask)
    cases.assert_matches((o, lse), args)
    torch.testing.assert_close(o[0, 0].float(), v[0].float().mean(0), atol=0.01, rtol=0)


@on_each_kernel
def test_rows_of_zeros_and_large_scores(dtype, arch):
    """A scale of 0 times a masked score is no NaN; and a score far above its sequence's others is one whole probability."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 150, 2, 64, generator=g).half() for _ in range(3))
    q[0, 100] = 0
    k[0, 20, 0] = 0
    for times in (1, 100):
        args = with_lse(arch, (q * times), (k * times), v, dtype=dtype, causal=True)
        cases.assert_matches(*args)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("dims", "dtype", "arch"),
    [
        *((dims, "int8", arch) for dims in (64, 128, 256) for arch in ("sm_80", "sm_90a")),
        *((dims, "fp8", arch) for dims in (64, 128) for arch in ("sm_89", "sm_90a")),
    ],
)
def test_scores_beyond_the_steps_of_their_exponents(dims, dtype, arch):
    """p is 2^x, and of x a part is taken, on wgmma 24 - log2(255), in e4m3 -log2(448), which scores of 10^9 would swallow; as they
    would what rounds the largest up: rows that are masked whole by such a number are means of their values, and of products so
    large the largest is taken."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 150, 2, dims, generator=g).half() for _ in range(3))
    mask = torch.zeros(150, 150)
    mask[:50], mask[50:80], mask[80:90], mask[:, 120:] = -1e9, -1e38, -3e4, -1e9
    result, args = with_lse(arch, q, k, v, mask=mask, dtype=dtype)
    cases.assert_matches(result, args)
    for row, first in ((10, 0), (60, 120)):
        expected = v[0, first:].float().mean(0)
        atol = 1e-2 if dtype == "int8" else 3e-2  # v has three bits
        torch.testing.assert_close(result[0][0, row].float(), expected, rtol=0, atol=atol)
    mask = torch.zeros(150, 150)
    near, _ = with_lse(arch, q, k, v, mask=mask, dtype=dtype)
    mask[100] = -1e9
    beside, _ = with_lse(arch, q, k, v, mask=mask, dtype=dtype)
    others = torch.arange(150) != 100
    assert_equal(beside[0][:, others], near[0][:, others], "rows beside one that is far")
    for times in (30, 300, 5000):
        cases.assert_matches(*with_lse(arch, q * times, k * times, v, causal=True, scale=100.0, dtype=dtype))


@pytest.mark.every(2)
@on_each_kernel
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e7, 1e30])
@torch.inference_mode()
def test_scales_of_the_softmax_that_are_far_from_1(dtype, arch, scale):
    """Beside a row's own the least are 0 in float32, and all of its scores with them."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 150, 2, 64, generator=g).bfloat16() for _ in range(3))
    q[0, 7] = 0
    options = {"dtype": dtype, "scale": scale, "sinks": torch.tensor([-2.0, 3.0])}
    for times in (1.0, 2.0**40 if scale < 1e30 else 2.0**-40):
        cases.assert_matches(*with_lse(arch, q * times, k * times, v, causal=True, **options))
    if scale < 1:
        cases.assert_matches(*with_lse(arch, q * 2.0**-100, k * 50, v, window_left=90, window_right=90, **options))


@pytest.mark.parametrize(("dims", "arch"), paired([64, 128, 256], ["sm_80", "sm_90a"]))
def test_blocks_of_v_of_other_sizes(dims, arch):
    """Each block of 64 keys has its own scale of v: of two that a kernel multiplies at a time too."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 300, 2, dims, generator=g).half() for _ in range(3))
    v *= torch.tensor([1, 0.01, 30, 0.1, 3]).repeat_interleave(64)[:300, None, None]
    for options in ({}, {"causal": True}, {"window_left": 70, "window_right": 0, "softcap": 20.0}):
        cases.assert_matches(*with_lse(arch, q, k, v, **options))


@on_each_kernel
def test_a_peak_and_a_long_tail(dtype, arch):
    """A key whose probability is a thousand times that of each of 4096 others leaves these what they add up to."""
    g = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 1, 1, 64).half()
    q[..., 0] = 8.0
    k = torch.randn(1, 4096, 1, 64, generator=g).half() * 0.01
    k[0, 777, 0, 0] = 7.0  # times 8 and 1/8: e^7 = 1097
    v = torch.ones(1, 4096, 1, 64).half() + torch.randn(1, 4096, 1, 64, generator=g).half() * 0.1
    (o, lse), args = with_lse(arch, q, k, v, rotates=False, dtype=dtype)
    cases.assert_matches((o, lse), args)
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v)))
    assert (o.double() - exact.transpose(1, 2)).norm() < 0.02 * exact.norm()


@pytest.mark.every(2)
@pytest.mark.parametrize("arch", ["sm_89", "sm_90a"])
def test_one_level_of_sums_against_two_under_the_truncating_accumulator(arch, seed):
    """64k values of one sign: tensor cores cut a product to 13 bits below their sum, so a sum of all keys stops growing. The
    kernel's sums of 64 keys do not, on an accumulator that is as coarse."""
    keys, d, columns = 65536, 32, 8
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, n, 1, d, generator=g).half() for n in (2, keys, keys))
    v = v.abs() + 0.5
    (o, _), args = with_lse(arch, q, k, v, dtype="fp8", truncating=True)
    expected = reference.attention_8bit(*args)[0, :, 0].double()

    def error(y):
        return ((y.double() - expected[:, :columns]).norm() / expected[:, :columns].norm()).item()

    x = reference.quantize(q[0], k[0], v[0], True, "fp8")
    s = x.q[0] @ x.k[0].T * x.k_scale[0].T * x.q_scale[0] / d**0.5
    p = (s - s.amax(1, keepdim=True)).exp()
    of_products = x.v_scale[0, :, :columns] / (448 * p.sum(1, keepdim=True))
    p8, v8 = reference.rounded(p * 448, "fp8"), x.v[0, :, :columns].T
    one, two = (tensor_core_product(p8, v8, depth) * of_products for depth in (None, reference.BLOCK))
    assert error(o[0, :, 0, :columns]) < 2**-10 and error(two) < 2**-10  # .0004; two's units are of rows, not of blocks
    assert error(one) > 0.5  # .51 to .52


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_rows_that_are_far_apart(arch):
    """Strides beyond 32 bits: 8 GiB of keys, of which a few rows are ever touched."""
    memory = torch.UntypedStorage(8 * 2**30 + 2**16)
    far = torch.empty(0, dtype=torch.float16).set_(memory, 0, (1, 65, 1, 64), (0, 2**26, 0, 1))
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 65, 64, generator=g).half().reshape(3, 1, 65, 1, 64)
    far.copy_(k)
    expected = with_lse(arch, q, k, v)[0][0]
    for operands in ((far, k, v), (q, far, v), (q, k, far)):
        near = [far if x is far else y for x, y in zip(operands, (q, k, v))]
        far.copy_((q, k, v)[[x is far for x in operands].index(True)])
        assert_equal(with_lse(arch, *near)[0][0], expected)


@pytest.mark.every(2)
@on_each_kernel
@pytest.mark.parametrize(("dims", "causal"), paired([(64, 64), (128, 128), (256, 256)], [True, False]))
def test_wavefronts(dims, causal, dtype, arch):
    """Shared memory is read and written without bank conflicts."""
    case = cases.Case((256, 512), dims, batch=1, heads=(2, 1), causal=causal, awkward=False, products=dtype)
    args = case.arguments()
    with fp.interpret(arch, counters=True) as device, fp.use_backend("cuda"):
        dispatch.operations["attention_8bit"](*args)
    ratios = {k.kernel: k.counts.conflict_ratio for k in device.kernels()}
    assert len(ratios) == 3 and set(ratios.values()) <= {None, 1.0}
