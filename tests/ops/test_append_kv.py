"""append_kv: every backend writes the reference's bits, and nothing else."""

import pytest
import torch
from every_backend import in_triton, on_cuda
from rotation import in_parts, whole

import forwardpass as fp
from forwardpass.ops.append_kv import OPERATION, cases, reference
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.testing import assert_equal

CASES = list(cases.cases())


def after(case, backend, seed=0, **interpreted):
    """The arguments after the call."""
    args = case.arguments(seed=seed)
    with fp.use_backend(backend):
        if interpreted:
            with fp.interpret(**interpreted, seed=seed):
                OPERATION(*args)
        else:
            assert OPERATION(*args) is None
    return args


def expected(case, seed=0):
    args = case.arguments(seed=seed)
    reference.append_kv(*args)
    return args


@pytest.mark.parametrize("case", [whole(CASES)])
def test_cpu(case, seed):
    cases.assert_matches(after(case, "cpu", seed), expected(case, seed))


@pytest.mark.parametrize(("case", "arch"), in_triton(CASES, 32))
def test_triton(case, arch, seed):
    """Guarded: whatever is written elsewhere is noticed, also where the caches are views of one tensor that overlap."""
    cases.assert_matches(after(case, "triton", seed, arch=arch, guard=True), expected(case, seed))


@pytest.mark.parametrize(("case", "arch"), on_cuda(CASES))
def test_cuda(case, arch, seed):
    cases.assert_matches(after(case, "cuda", seed, arch=arch, guard=True), expected(case, seed))


@pytest.mark.parametrize("page", [None, 16])
def test_what_is_written(page):
    """Word by word: a row for each token, at its position; nothing where there is none."""
    case = cases.Case((5, 1, 0), 3, 8, 1, torch.float32, page=page)
    args = after(case, "cpu")
    k, k_cache, lengths, table = args[0], args[2], args[4], args[5]
    before = case.arguments()[2]
    written = torch.zeros(k_cache.shape[:2], dtype=torch.bool)
    for b, length in enumerate(lengths.tolist()):
        for i in range(3):
            position = length - 3 + i
            if position < 0:
                continue
            at = (b, position) if page is None else (int(table[b, position // page]), position % page)
            assert torch.equal(k_cache[at], k[b, i])
            written[at] = True
    assert_equal(k_cache[~written], before[~written])


def test_rotary_is_that_of_transformers():
    """Its rotate_half, word by word."""
    k = torch.randn(2, 3, 2, 16)
    angle = torch.rand(2, 3, 8).repeat(1, 1, 2)
    cache = torch.zeros(2, 3, 2, 16)
    lengths = torch.tensor([3, 3], dtype=torch.int32)
    fp.ops.append_kv(k, k, cache, cache.clone(), lengths, rotary=(angle.cos(), angle.sin()))
    rotate_half = torch.cat((-k[..., 8:], k[..., :8]), -1)
    torch.testing.assert_close(cache, k * angle.cos().unsqueeze(2) + rotate_half * angle.sin().unsqueeze(2))


def test_interleaved_rotary_is_that_of_complex_numbers():
    """Two neighbouring columns are one complex number, as GPT-J has it."""
    k, angle = torch.randn(2, 3, 2, 16), torch.rand(2, 3, 6)
    cache, lengths = torch.zeros(2, 3, 2, 16), torch.tensor([3, 3], dtype=torch.int32)
    rotary = tuple(x.repeat_interleave(2, -1) for x in (angle.cos(), angle.sin()))
    got = fp.ops.append_kv(k, k, cache, cache.clone(), lengths, rotary=rotary, q=k, interleaved=True)
    turned = torch.view_as_complex(k[..., :12].unflatten(-1, (-1, 2))) * torch.polar(torch.ones(()), angle).unsqueeze(2)
    for actual in (cache, got):
        torch.testing.assert_close(actual[..., :12], torch.view_as_real(turned).flatten(-2))
        assert_equal(actual[..., 12:], k[..., 12:])


def test_norm_is_that_of_torch():
    """Qwen3's: of each head of q and k, before the rotation."""
    q, k = torch.randn(2, 3, 4, 40), torch.randn(2, 3, 2, 40)
    weights = {name: torch.rand(40) for name in ("q_norm", "k_norm")}
    cache, lengths = torch.zeros(2, 3, 2, 40), torch.tensor([3, 3], dtype=torch.int32)
    given = q.clone()
    got = fp.ops.append_kv(k, k, cache, cache.clone(), lengths, q=q, **weights, norm_eps=1e-3)
    for actual, x, weight in ((got, q, weights["q_norm"]), (cache, k, weights["k_norm"])):
        torch.testing.assert_close(actual, torch.nn.functional.rms_norm(x, (40,), weight, 1e-3))
    assert got.is_contiguous()
    assert_equal(q, given)


def test_sum_of_squares_that_overflows_shows():
    k = torch.full((1, 1, 1, 64), 1e20)
    for backend in ("cpu", "reference"):
        cache = torch.zeros(1, 1, 1, 64)
        with fp.use_backend(backend):
            fp.ops.append_kv(k, k, cache, cache.clone(), torch.ones(1, dtype=torch.int32), k_norm=torch.ones(64))
        assert cache.isnan().all()


def test_scales_per_token_are_those_of_quantize():
    x = torch.randn(2, 1, 2, 64)
    for dtype in (torch.int8, E4M3):
        k_cache, v_cache = (torch.zeros(2, 4, 2, 64, dtype=dtype) for _ in "kv")
        k_scale, v_scale = torch.zeros(2, 4, 2), torch.zeros(2, 4, 2)
        lengths = torch.tensor([4, 1], dtype=torch.int32)
        fp.ops.append_kv(x, x, k_cache, v_cache, lengths, k_scale=k_scale, v_scale=v_scale)
        q, scale, _ = fp.ops.quantize(x, dtype)
        for b, position in enumerate((3, 0)):
            assert_equal(k_cache[b, position].float(), q[b, 0].float())
            assert_equal(v_scale[b, position], scale[b, 0])


@pytest.mark.every(2)
@pytest.mark.parametrize("case", in_parts([c for c in CASES if c.cache != E4M3][::7], 3))
def test_opcheck(case):
    """Of dtypes that torch's own check can compute with."""
    torch.library.opcheck(torch.ops.forwardpass.append_kv_cpu.default, case.arguments())


@pytest.mark.every(2)
@pytest.mark.parametrize("case", [CASES[0], CASES[3], cases.Case(cache=E4M3), cases.Case(layout="together")], ids=str)
def test_compiles_whole(case):
    def f(*args):
        OPERATION(*args)
        return args[2].sum() if args[2].dtype != E4M3 else args[0]

    torch.compiler.reset()
    args = case.arguments()
    with fp.use_backend("cpu"):
        torch.compile(f, fullgraph=True, backend="aot_eager")(*args)
    cases.assert_matches(args, expected(case))


K, CACHE = torch.ones(2, 1, 2, 8), torch.zeros(2, 4, 2, 8)
LENGTHS = torch.tensor([3, 1], dtype=torch.int32)
ONE = torch.ones(1)
ROTARY = torch.ones(1, 1, 8)
INT8 = CACHE.to(torch.int8)
SCALE = torch.ones(2, 4, 2)


@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    [
        ((K, K[:, :, :1], CACHE, CACHE.clone(), LENGTHS), {}, ValueError, "k and v must have one shape without columns"),
        ((K, K.half(), CACHE, CACHE.clone(), LENGTHS), {}, ValueError, "k and v must have one shape without columns and one dtype"),
        ((K.half(), K.half(), CACHE, CACHE.clone(), LENGTHS), {}, TypeError, "k_cache must be a tensor of k's dtype"),
        ((K[:, :, :1], K[:, :, :1], CACHE, CACHE.clone(), LENGTHS), {}, ValueError, "k must have the heads of k_cache, 2, not 1"),
        ((K, K, CACHE[:, :1].expand(2, 4, 2, 8), CACHE, LENGTHS), {}, ValueError, "k_cache is expanded"),
        ((K, K, CACHE, CACHE.clone(), LENGTHS), {"rotary": ROTARY}, TypeError, r"rotary must be \(cos, sin\) or None, not Tensor"),
        ((K, K, CACHE, CACHE.clone(), LENGTHS), {"rotary": (ROTARY, None)}, TypeError, "sin of rotary must be a tensor"),
        ((K, K, CACHE, CACHE.clone(), LENGTHS), {"rotary": (ROTARY, ROTARY[..., :7])}, ValueError, "an even number"),
        ((K, K, CACHE, CACHE.clone(), LENGTHS), {"rotary": (ROTARY, ROTARY[..., :6])}, ValueError, "cos and sin of rotary must"),
        ((K, K, CACHE, CACHE.clone(), LENGTHS), {"q": K.half()}, ValueError, r"q must be torch.float32 \[2, 1, H, 8\], as k but"),
        ((K, K, CACHE, CACHE.clone(), LENGTHS), {"q": K[:1]}, ValueError, "q must be torch.float32"),
        ((K, K, CACHE, CACHE.clone(), LENGTHS), {"q": 1}, TypeError, "q must be a tensor, not int"),
        ((K, K, CACHE, CACHE.clone(), LENGTHS), {"q_norm": ONE}, ValueError, "q_norm is the norm of q: pass q"),
        ((K, K, CACHE, CACHE.clone(), LENGTHS), {"k_norm": ONE}, ValueError, "k_norm must be contiguous with 8 elements"),
        ((K, K, CACHE, CACHE.clone(), LENGTHS), {"k_norm": ONE.double()}, TypeError, "k_norm must be a tensor of torch.float32"),
        ((K, K, CACHE, CACHE.clone(), LENGTHS), {"interleaved": True}, ValueError, "pass rotary, or leave interleaved out"),
        ((K, K, CACHE, CACHE.clone(), LENGTHS), {"rotary": (ROTARY, ROTARY), "interleaved": 1}, TypeError, "interleaved must be"),
        ((K, K, CACHE, CACHE.clone(), LENGTHS), {"norm_eps": -1.0}, ValueError, "norm_eps must be a number of at least 0"),
        ((K, K, CACHE, CACHE[:], LENGTHS), {}, ValueError, "k_cache and v_cache are the same memory, where v would overwrite k: "
         "pass two tensors"),
        ((K, K, INT8, INT8.clone(), LENGTHS), {"k_scale": SCALE, "v_scale": SCALE}, ValueError, "k_scale and v_scale are the same "
         "memory"),
        ((K, K, INT8, INT8.clone(), LENGTHS), {"k_scale": ONE}, TypeError, "v_scale must be a float32 tensor for a cache"),
    ],
)  # fmt: skip
def test_refusals_leave_the_cache(args, options, error, words):
    before = args[2].clone()
    for backend in ("cpu", "reference"):
        with fp.use_backend(backend), pytest.raises(error, match=words):
            fp.ops.append_kv(*args, **options)
    assert_equal(args[2].contiguous(), before.contiguous())


def test_one_memory_is_refused_in_every_call():
    """Of the same shapes, which Python checks once."""
    cache = CACHE.clone()
    for backend in ("cpu", "reference"):
        with fp.use_backend(backend):
            fp.ops.append_kv(K, K, cache, cache.clone(), LENGTHS)
            before = cache.clone()
            with pytest.raises(ValueError, match="k_cache and v_cache are the same memory"):
                fp.ops.append_kv(2 * K, K, cache, cache, LENGTHS)
        assert_equal(cache, before)
