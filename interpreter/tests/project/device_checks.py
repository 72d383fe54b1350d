"""Tests of a project that says device="cuda" and never imports gpuless: test_pytest_gpu.py runs them with --gpu."""

import copy
import io
import os
import pathlib
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

assert torch.cuda.is_available() and torch.cuda.device_count() == 1  # as projects ask when they are imported
DEVICE = torch.device("cuda")
generator = torch.Generator().manual_seed(0)
A = torch.randn(6, 5, generator=generator)
B = torch.randn(5, 4, generator=generator)
IMAGE = torch.randn(2, 4, 9, 8, generator=generator)

OPERATIONS = {
    "add": lambda a, b, i: a + 1.5,
    "matmul": lambda a, b, i: a @ b,
    "einsum": lambda a, b, i: torch.einsum("ij,jk->ki", a, b),
    "transposed": lambda a, b, i: a.t()[1:, ::2].contiguous(),
    "view": lambda a, b, i: a.view(5, 6).flatten(),
    "half": lambda a, b, i: a.half().float(),
    "sort": lambda a, b, i: torch.cat([t.double() for t in a.sort(dim=1)]),
    "topk": lambda a, b, i: a.topk(2).values,
    "softmax": lambda a, b, i: F.softmax(a, dim=0),
    "layer norm": lambda a, b, i: F.layer_norm(a, (5,)),
    "rms norm": lambda a, b, i: F.rms_norm(a, (5,)),
    "cross entropy": lambda a, b, i: F.cross_entropy(a, a.argmax(1)),
    "convolution": lambda a, b, i: F.conv2d(i, i[:, :2, :3, :3].repeat(1, 2, 1, 1)),
    "depthwise": lambda a, b, i: F.conv2d(i, i.new_ones(4, 1, 3, 3), groups=4),
    "attention": lambda a, b, i: F.scaled_dot_product_attention(i, i, i, is_causal=True),
    "cumsum": lambda a, b, i: a.cumsum(1),
    "where": lambda a, b, i: torch.where(a > 0, a, -a),
    "masked": lambda a, b, i: a[a > 0],
    "indexed by the CPU": lambda a, b, i: a[torch.tensor([0, 2])],
    "nonzero": lambda a, b, i: (a > 0).nonzero(),
    "unique": lambda a, b, i: a.round().unique(),
    "stack": lambda a, b, i: torch.stack([a, a]).sum(0),
    "in place": lambda a, b, i: a.clone().mul_(2).add_(a),
    "empty": lambda a, b, i: a[:0].sum() + a[:0].numel(),
    "scalar of the CPU": lambda a, b, i: a * torch.tensor(2.0),
    "expanded": lambda a, b, i: a[:1].expand(3, 5) + 1,
    "vmap": lambda a, b, i: torch.vmap(lambda row: row @ b)(a),
    "interpolate": lambda a, b, i: F.interpolate(i, scale_factor=2.0, mode="bilinear"),
    "batch norm": lambda a, b, i: F.batch_norm(i, None, None, training=True),
    "complex": lambda a, b, i: torch.view_as_real(torch.fft.fft(a)),
    "conjugate": lambda a, b, i: torch.view_as_real(torch.complex(a, a).conj() * 2),
    "linalg": lambda a, b, i: torch.linalg.inv(b[:4] + 3 * torch.eye(4, device=b.device)),
    "out": lambda a, b, i: torch.add(a, 1, out=torch.empty(0, device=a.device)),
    "number as a tensor": lambda a, b, i: (a * 8).int() & 3,
    "remainder": lambda a, b, i: a % 2,
    "half with a number": lambda a, b, i: torch.fmod(a.half(), 1.5).float(),
    "copied number": lambda a, b, i: a.clone().copy_(torch.tensor(3)),
    "fp8": lambda a, b, i: a.to(torch.float8_e4m3fn).float(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    expected = OPERATIONS[name](A, B, IMAGE)
    result = OPERATIONS[name](A.to(DEVICE), B.cuda(), IMAGE.to("cuda"))
    assert result.is_cuda and result.device == torch.device("cuda", 0)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_cpu():
    def model(device):
        torch.manual_seed(0)
        layers = torch.nn.Sequential(
            torch.nn.Conv2d(4, 8, 3),
            torch.nn.BatchNorm2d(8),
            torch.nn.GELU(),
            torch.nn.Flatten(),
            torch.nn.Linear(336, 3),
        )
        return layers.to(device)

    gradients = []
    for device in ("cpu", "cuda"):
        layers = model(device)
        optimizer = torch.optim.AdamW(layers.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            F.mse_loss(layers(IMAGE.to(device)), torch.ones(2, 3, device=device)).backward()
            optimizer.step()
        gradients.append([p.detach().cpu() for p in layers.parameters()])
    for cpu, cuda in zip(*gradients):
        torch.testing.assert_close(cuda, cpu, rtol=1e-5, atol=1e-6)


def test_autograd_function_and_hooks():
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            seen.append(gradient.device)
            return 2 * gradient

    x = A.cuda().requires_grad_()
    x.register_hook(lambda g: seen.append(g.device))
    Double.apply(x).sum().backward()
    assert seen == [torch.device("cuda", 0)] * 2 and x.grad.is_cuda


def test_autocast():
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (A.cuda() @ B.cuda()).dtype == torch.bfloat16
    assert (A.cuda() @ B.cuda()).dtype == torch.float32


def test_views_share_memory():
    x = torch.zeros(4, 3, device="cuda")
    view = x[1:3].t()
    view.fill_(1)
    assert x.sum().item() == 6 and view._base is x
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    c = torch.zeros(2, dtype=torch.complex64, device="cuda")
    torch.view_as_real(c).fill_(1)
    assert torch.equal(c.cpu(), torch.full((2,), 1 + 1j))
    torch.view_as_complex(x.view(2, 6)[:, :2]).fill_(2j)
    assert torch.equal(x.view(2, 6)[:, :2].cpu(), torch.tensor([[0.0, 2.0]] * 2))


def test_resized_storages():
    """All tensors of a storage see it, as FSDP frees and brings back its parameters."""
    x = torch.arange(6.0, device="cuda")
    view, storage = x[2:], x.untyped_storage()
    free = torch.cuda.memory_allocated()
    assert storage.resize_(0) is storage and storage.nbytes() == 0 and torch.cuda.memory_allocated() == free - 24
    storage.resize_(24)
    assert torch.cuda.memory_allocated() == free and x.isnan().all()
    x.fill_(3)
    assert view.eq(3).all() and view.data_ptr() == x.data_ptr() + 8 and x.device == torch.device("cuda", 0)
    storage.resize_(40)
    assert x.eq(3).all() and x.untyped_storage().nbytes() == 40 and view.data_ptr() == x.data_ptr() + 8
    x.resize_(5, 4)
    assert (
        storage.nbytes() == 80
        and x.flatten()[:6].eq(3).all()
        and x[4].isnan().all()
        and view.data_ptr() == x.data_ptr() + 8
    )
    x.set_(torch.zeros(3, device="cuda").untyped_storage(), 1, (2, 2))
    assert x.stride() == (2, 1) and x.untyped_storage().nbytes() == 20 and x[0].eq(0).all() and x[1, 1].isnan()
    assert add(x, x).shape == (2, 2) and add(view, view).eq(6).all()  # kernels may touch the new memory
    typed = torch.zeros(4, dtype=torch.int16, device="cuda")
    typed._typed_storage()._resize_(0)
    assert typed.untyped_storage().nbytes() == 0 and typed.untyped_storage().new().device.type == "cuda"
    host = torch.zeros(2)
    assert host.untyped_storage().resize_(12).nbytes() == 12


def test_unwritten_memory_is_nan():
    assert torch.empty(3, device="cuda").isnan().all()


def test_copies():
    x = A.cuda()
    assert copy.deepcopy(x).is_cuda and torch.equal(copy.deepcopy(x), x) and copy.deepcopy(x).data_ptr() != x.data_ptr()
    file = io.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, map_location="cpu")["x"], A)
    file.seek(0)
    assert torch.load(file)["x"].is_cuda
    assert torch.equal(x.to("cpu", non_blocking=True), A)
    assert torch.equal(A.pin_memory().to("cuda", non_blocking=True).cpu(), A)
    assert torch.equal(torch.zeros(3, pin_memory=True).cuda().cpu(), torch.zeros(3))


def test_printing():
    for x in (A, torch.randn(1, 2000), torch.zeros(0), A[0].to(torch.complex64), A > 0, A[0].to(torch.float8_e4m3fn)):
        words = ["".join(repr(t).split()) for t in (x, x.cuda())]
        assert ",device='cuda:0'" in words[1] and words[1].replace(",device='cuda:0'", "") == words[0]
    assert "device='cuda:0', requires_grad=True" in str(torch.ones(2, device="cuda", requires_grad=True))
    assert "0.5000" in f"{torch.nn.Parameter(torch.full((2, 2), 0.5, device='cuda'))}"


def test_a_project_replaces_torch_empty(monkeypatch):
    for name in ("empty", "empty_strided"):
        function = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, f=function, **options: f(*args, **{**options, "device": "cuda"}))
    assert (
        torch.empty(3).is_cuda and torch.empty_strided((2,), (1,)).is_cuda and torch.ones(2, device="cuda").sum() == 2
    )


def test_mistakes_are_refused():
    with pytest.raises(RuntimeError, match="same device"):
        A.cuda() + A
    with pytest.raises(RuntimeError, match=r"invalid device ordinal.*cuda:1"):
        torch.empty(1, device="cuda:1")
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.set_device(1)
    with pytest.raises(TypeError, match="convert cuda:0"):
        A.cuda().numpy()
    with pytest.raises(NotImplementedError, match=r"torch.cuda.MemPool"):
        torch.cuda.MemPool()
    with pytest.raises(torch.cuda.OutOfMemoryError, match="left"):
        torch.empty(1 << 40, device="cuda")


def test_what_is_refused_is_still_a_context_manager_to_dynamo():
    """torch 2.15 lists the function that `use_mem_pool` wraps when it imports dynamo."""
    for pool in (torch.cuda.use_mem_pool, torch.cuda.use_mem_pool.__wrapped__):
        with pytest.raises(NotImplementedError, match="use_mem_pool is not there"):
            pool(None)


def test_the_card():
    properties = torch.cuda.get_device_properties(0)
    assert (properties.major, properties.minor) == torch.cuda.get_device_capability() == (9, 0)
    assert properties.multi_processor_count == 132 and "H100" in torch.cuda.get_device_name()
    assert torch.accelerator.current_accelerator().type == "cuda" and torch.cuda.is_bf16_supported()


def test_memory():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    x = torch.empty(1 << 20, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4 << 20
    del x
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() >= before + (4 << 20)
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == before


@triton.jit
def touch_kernel(x, step, n, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + k * step, tl.load(x + k * step, mask=k < n) + k.to(tl.int32), mask=k < n)


def test_large_tensors_cost_what_is_written(request):
    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20

    n, touched = 1 << 33, 1000
    touch_kernel[(8,)](torch.zeros(touched, dtype=torch.int32, device="cuda"), 1, touched, BLOCK=128)  # compiled
    before = resident()
    zeros, poison = torch.zeros(n, dtype=torch.int32, device="cuda"), torch.empty(n, dtype=torch.int32, device="cuda")
    assert resident() - before < 32  # MB: the file of poison has 16
    with pytest.raises(torch.cuda.OutOfMemoryError, match="17179869184 of the GPU's are left"):
        torch.empty(n, dtype=torch.int32, device="cuda")
    step = n // touched
    for x, first in ((zeros[: touched * step], 0), (poison[: touched * step], -1)):
        if request.config.option.gpu_guard:  # its copies are as large as the arguments
            x[::step] += torch.arange(touched, dtype=torch.int32, device="cuda")
        else:
            touch_kernel[(8,)](x, step, touched, BLOCK=128)
        assert torch.equal(x[::step].cpu(), torch.arange(first, first + touched, dtype=torch.int32))
        assert torch.equal(x[1::step].cpu(), torch.full((touched,), first, dtype=torch.int32))
    assert resident() - before < 100
    zeros[5:].zero_()
    assert zeros[5:].is_contiguous() and not zeros[::step].any()


def test_random_numbers():
    torch.cuda.manual_seed(3)
    first = torch.randn(5, device="cuda")
    torch.cuda.manual_seed(3)
    assert torch.equal(first, torch.randn(5, device="cuda"))
    ours = torch.Generator(device="cuda").manual_seed(3)
    assert torch.equal(first, torch.randn(5, device="cuda", generator=ours)) and ours.device.type == "cuda"
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.randn(5, device="cuda", generator=generator)


def test_a_library_takes_its_seed_and_offset_from_torch_s_generator():
    (default,) = torch.cuda.default_generators
    state = default.get_state()
    state.view(torch.int64)[:] = torch.tensor([1234, 8])
    default.set_state(state)
    assert (default.initial_seed(), default.get_offset()) == (1234, 8)
    first = torch.rand(5, device="cuda")
    assert default.get_state().view(torch.int64).tolist() == [1234, 12]
    assert not torch.equal(first, torch.rand(5, device="cuda"))
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(5, device="cuda"))
    with pytest.raises(RuntimeError, match="multiple of 4"):
        default.set_offset(6)
    with pytest.raises(TypeError, match="16 bytes"):
        default.set_state(torch.get_rng_state())


def test_random_numbers_of_the_cpu_and_of_cuda_are_apart():
    torch.manual_seed(5)
    without = torch.rand(5)
    torch.manual_seed(5)
    cuda = torch.rand(5, device="cuda")
    dropped = torch.nn.functional.dropout(torch.ones(64, device="cuda"))
    assert torch.equal(torch.rand(5), without)
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(torch.rand(5, device="cuda"), cuda)
    assert torch.equal(torch.nn.functional.dropout(torch.ones(64, device="cuda")), dropped)


def test_no_tensor_for_another_process():
    with pytest.raises(NotImplementedError, match="sharing a cuda tensor with another process"):
        ForkingPickler.dumps(A.cuda())


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


def add(x, y):
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), 256),)](x, y, out, x.numel(), BLOCK=256)
    return out


def test_streams_and_events():
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() is stream
        start.record()
        x = add(A.cuda(), A.cuda())
        end.record()
        x.record_stream(stream)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert 0 < start.elapsed_time(end) < 1  # milliseconds, modelled: a few instructions


@pytest.mark.parametrize("n", [1, 255, 1000])
def test_triton(n):
    x, y = torch.randn(2, n, device="cuda").unbind()
    assert torch.equal(add(x, y), x + y)


def test_within_modes():
    """Where a dispatch mode is on the stack but off, torch finds no fallback: each operation has its own kernel."""
    from torch.utils._mode_utils import no_dispatch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            return operation(*args, **kwargs or {})

    with Mode(), Mode():
        x = torch.randn(3, device="cuda").exp()
        with no_dispatch():
            y = torch.rand(3, device="cuda") + x
    assert x.is_cuda and y.gt(x).all()


def test_dynamo_can_be_reset():
    import torch._dynamo

    torch._dynamo.reset()


@triton.jit
def optional_kernel(x, more, MORE: tl.constexpr):
    tl.store(x, 2.0)
    if MORE:
        tl.store(more, 3.0)


def test_an_empty_tensor_is_a_null_pointer():
    x = torch.zeros(1, device="cuda")
    compiled = optional_kernel[(1,)](x, torch.empty(0), MORE=False)
    assert x.item() == 2
    with pytest.raises(TypeError, match="takes 3 arguments"):
        compiled[(1, 1, 1)](x)


def test_triton_takes_no_cpu_tensor():
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        add(A.cuda(), A)


def test_triton_driver():
    driver = triton.runtime.driver.active
    assert driver.get_active_torch_device() == torch.device("cuda", 0)
    assert driver.utils.get_device_properties(None)["multiprocessor_count"] == 132
    kernel = add_kernel.warmup(torch.float32, torch.float32, torch.float32, 1, BLOCK=64, grid=(1,))
    kernel._init_handles()
    assert kernel.n_regs > 0


def test_benchmarks_have_modelled_times():
    small, large = (torch.ones(n, device="cuda") for n in (1 << 12, 1 << 24))
    times = [triton.testing.do_bench(lambda t=t: add(t, t + 1)) for t in (small, large)]
    bound = 3 * 4 * (1 << 24) / 3.352e12 * 1e3  # bytes at the H100's bandwidth, in milliseconds
    assert times[0] < times[1] and 1.66 * bound <= times[1] < 2 * bound  # three tensors, and two for t + 1
    assert (
        triton.testing.do_bench(lambda: large + small[0], quantiles=[0.5, 0.2])
        == [pytest.approx(2 / 3 * bound, rel=0.01)] * 2
    )
    assert torch.equal(add(large, large), large + large)  # after it, launches are whole


@triton.jit
def last_first_kernel(flag, out):
    if tl.program_id(0) == 31:
        tl.atomic_xchg(flag, 1)
    else:
        while tl.atomic_add(flag, 0) == 0:
            pass
    tl.store(out + tl.program_id(0), 1)


def test_a_benchmark_of_programs_that_wait_for_the_last():
    flag, out = torch.zeros(33, device="cuda", dtype=torch.int32).split([1, 32])
    assert triton.testing.do_bench(lambda: last_first_kernel[(32,)](flag, out)) > 0
    assert out.sum().item() == 32  # a sample would have waited for ever: it ran whole, and without a finding


@triton.autotune([triton.Config({"BLOCK": b}) for b in (64, 256)], key=["n"])
@triton.jit
def tuned_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def test_autotuned():
    x = torch.randn(10_000, device="cuda")
    out = torch.empty_like(x)
    tuned_kernel[lambda meta: (triton.cdiv(10_000, meta["BLOCK"]),)](x, out, 10_000)
    assert torch.equal(out, 2 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.int8])
def test_trace_of_any_dtype(dtype):
    t = torch.arange(1, 21).reshape(4, 5)
    expected = t.diagonal().to(dtype).sum()
    trace = t.to("cuda", dtype).trace()
    assert trace.dtype == expected.dtype and trace.cpu() == expected
    with pytest.raises(RuntimeError, match="expected a matrix"):
        torch.ones(2, 2, 2, device="cuda").to(dtype).trace()


@triton.jit
def grouped_kernel(addresses, out, n, BLOCK: tl.constexpr):
    x = tl.load(addresses + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * n + i, tl.load(x + i, mask=i < n), mask=i < n)


def test_addresses_kept_in_tensors():
    group = [torch.randn(100, device="cuda") for _ in range(3)]
    out = torch.empty(3, 100, device="cuda")
    grouped_kernel[(3,)](torch.tensor([t.data_ptr() for t in group], device="cuda"), out, 100, BLOCK=128)
    assert torch.equal(out, torch.stack(group))


class Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return add(x, y)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, add(gradient.contiguous(), gradient.contiguous())  # that of a sum has strides of 0


def test_triton_in_autograd():
    x, y = (torch.randn(300, device="cuda", requires_grad=True) for _ in range(2))
    Added.apply(x, y).sum().backward()
    assert x.grad.eq(1).all() and y.grad.eq(2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_triton_s_cublas(dtype):
    from triton._C.libtriton import nvidia

    blas = nvidia.cublas.CublasLt(torch.empty(1 << 20, device="cuda", dtype=torch.uint8))
    a, b = (torch.randn(n, 64, device="cuda").to(dtype) for n in (48, 32))
    c, d = (torch.full((48, 32), 4.0, device="cuda").to(dtype) for _ in range(2))
    expected = a.double().cpu() @ b.double().cpu().T
    blas.gemm(a, b, c, d, 2.0, -0.5)
    assert torch.allclose(d.double().cpu(), (2 * expected - 2).to(dtype).double(), atol=1e-2, rtol=0.07)
    blas.matmul(a, b, c)
    assert torch.allclose(c.double().cpu(), expected.to(dtype).double(), atol=1e-2, rtol=0.07)
    with pytest.raises(RuntimeError, match=r"needs \(m, k\), \(n, k\) and \(m, n\)"):
        blas.matmul(a, b.T, c)


@pytest.mark.parametrize(("form", "columns"), [("mxfp8", 32), ("nvfp4", 16)])
def test_triton_s_cublas_of_block_scales(form, columns):
    from triton._C.libtriton import nvidia

    m, n, k = 256, 128, 8 * columns
    blas = nvidia.cublas.CublasLt(torch.empty(1 << 20, device="cuda", dtype=torch.uint8))
    two = "fp4" in form
    packed = [torch.randint(0, 256 if two else 60, (rows, k // 2 if two else k), dtype=torch.uint8) for rows in (m, n)]
    scales = [torch.randint(50, 60, (rows * k // columns,), dtype=torch.uint8) + (0 if two else 70) for rows in (m, n)]
    c = torch.empty(m, n, device="cuda", dtype=torch.float16)
    getattr(blas, f"block_scaled_matmul_{form}")(*(t.cuda() for t in packed), c, *(t.cuda() for t in scales))
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    factors = []
    for t, s in zip(packed, scales):
        row, column = torch.meshgrid(torch.arange(len(t)), torch.arange(k), indexing="ij")
        value = e2m1[(t[row, column // 2] >> 4 * (column % 2)) & 15] if two else t.view(torch.float8_e4m3fn).double()
        group = column // columns  # cuBLAS's tiles of 128 rows and four groups, a row's four side by side
        i = (row // 128 * (k // columns // 4) + group // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
        factors.append(value * s.view(torch.float8_e4m3fn if two else torch.float8_e8m0fnu).double()[i])
    expected = factors[0] @ factors[1].T
    assert torch.allclose(c.double().cpu(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_proton_is_refused():
    import triton.profiler

    with pytest.raises(RuntimeError, match=r"CUPTI.*do_bench"):
        triton.profiler.start("profile")
