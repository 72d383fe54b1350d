"""Plain Triton launches on CPU tensors: every kind of argument, caches, autotuning, hooks; and nothing of it afterwards."""

import importlib.util
import pathlib

import pytest
import torch

import gpuless

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
    from triton.backends import backends
    from triton.runtime.driver import driver
    from triton.tools.tensor_descriptor import TensorDescriptor
    from triton_driver_kernels import (
        add,
        arguments,
        copy_by_descriptor,
        copy_by_descriptor_made_in_the_kernel,
        scale_by_bfloat16,
        scale_by_half,
        shared_sum,
        sum_of_pointers,
    )

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a")


@pytest.fixture
def x():
    return torch.arange(1, 101, dtype=torch.float32)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_scalars_arrive_as_they_are(arch):
    """Specialised (1, multiples of 16), None, tuples, every width and sign, half precision, bool."""
    out = torch.full((16,), float("nan"), dtype=torch.float64)
    with gpuless.gpu(arch):
        arguments[(1,)](out, 1, 16, -(2**31), 2**63 - 1, -(2**63), 2**64 - 1, 0.5, True, None, (3, -4), BLOCK=16)
    assert out.tolist() == [
        1, 16, -(2**31), 2.0**63, -(2.0**63), 2.0**64, 0.5, 1, 1, 3, -4, 16, *[0] * 4
    ]  # fmt: skip


def test_half_precision_scalars(x):
    y = torch.full_like(x, float("nan"))
    with gpuless.gpu("sm_80"):
        for kernel, type_, value in ((scale_by_half, "fp16", 0.333251953125), (scale_by_bfloat16, "bf16", 0.33203125)):
            compiled = kernel[(1,)](y.copy_(x), value, 100, BLOCK=128)
            assert compiled.src.signature["factor"] == type_
            assert torch.equal(y, x * value)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures_take_turns_with_one_kernel(arch, x):
    for _ in range(2):
        y = torch.full_like(x, float("nan"))
        with gpuless.gpu(arch):
            compiled = add[(1,)](x, x, y, 100, BLOCK=128)
        assert torch.equal(y, 2 * x)
        assert f".target sm_{arch.strip('sm_a')}" in compiled.asm["ptx"]
        assert "cubin" not in compiled.asm


def test_blocks_do_not_share_a_compiled_kernel(x):
    targets = set()
    for arch in ARCHITECTURES:
        with gpuless.gpu(arch):
            targets.add(add[(1,)](x, x, x.clone(), 100, BLOCK=128).metadata.target.arch)
    assert targets == {80, 89, 90}


def test_warmup_runs_nothing(x):
    with gpuless.gpu("sm_80") as device:
        compiled = add.warmup(x, x, x, 100, BLOCK=128, grid=(1,))
        assert ".entry add" in compiled.asm["ptx"]
    assert device.counters["launches"] == 0


def test_the_driver_and_the_compiler_are_what_they_were(x):
    before = driver._active, backends["nvidia"]
    with gpuless.gpu("sm_80"), gpuless.gpu("sm_90a"):
        assert driver.active.get_current_target().arch == 90
        assert driver.active.get_current_target().backend == "cuda"
    assert (driver._active, backends["nvidia"]) == before
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="active drivers"):
            add[(1,)](x, x, x, 100, BLOCK=128)


def test_autotuning_counts_and_is_the_same_each_time(x):
    tuned = triton.autotune([triton.Config({"BLOCK": b}) for b in (32, 64, 128)], key=["n"])(add)
    y = torch.empty_like(x)
    timings = []
    for arch in ("sm_80", "sm_90a", "sm_80"):
        tuned.cache.clear()
        with gpuless.gpu(arch):
            tuned[lambda meta: (triton.cdiv(100, meta["BLOCK"]),)](x, x, y.fill_(0), 100)
        assert torch.equal(y, 2 * x)
        timings.append({c.kwargs["BLOCK"]: t[0] for c, t in tuned.configs_timings.items()})
    assert timings[0] == timings[2]
    assert all(t > 0 for t in timings[0].values())
    assert tuned.best_config.kwargs["BLOCK"] == min(timings[2], key=timings[2].get)


def test_do_bench_measures_the_interpreter(x):
    with gpuless.gpu("sm_80"):
        ms = triton.testing.do_bench(lambda: add[(1,)](x, x, x.clone(), 100, BLOCK=128), warmup=1, rep=1)
    assert 0 < ms < 1e4


def test_a_finding_is_raised_at_the_launch_with_its_argument_and_line(x):
    with (
        gpuless.gpu("sm_80", seed=3) as device,
        pytest.raises(gpuless.Finding, match="argument x_ptr of add") as e,
    ):
        add[(1,)](x, x.clone(), torch.empty(128), 101, BLOCK=128)
    assert e.value.kind == "out_of_bounds"
    assert device.findings == [e.value]
    source = add.fn.__code__
    assert e.value.file.endswith("triton_driver_kernels.py")
    assert "tl.load(x_ptr" in pathlib.Path(source.co_filename).read_text().splitlines()[e.value.line - 1]


def test_guard_mode_gives_results_back_and_sees_more(x):
    wide = torch.zeros(2, 100)
    with gpuless.gpu("sm_80", guard=True):
        add[(1,)](x, x, wide[1], 100, BLOCK=128)
        assert torch.equal(wide, torch.stack([torch.zeros(100), 2 * x]))
        with pytest.raises(gpuless.Finding, match="out_ptr") as e:
            add[(1,)](x, x, wide[0, :99], 100, BLOCK=128)
    assert e.value.kind == "out_of_bounds"


def test_shared_memory_beyond_the_device_is_triton_s_own_error():
    y = torch.zeros(1)
    with gpuless.gpu("sm_89") as device:
        assert driver.active.utils.get_device_properties("sm_89")["max_shared_mem"] == 101376
        shared_sum[(1,)](torch.ones(1024), y, BLOCK=1024)
    assert y.item() == 1024
    assert device.findings == []


def test_clusters(x):
    y = torch.zeros_like(x)
    with gpuless.gpu("sm_90a"):
        add[(1,)](x, x, y, 100, BLOCK=128, num_ctas=2)
    assert torch.equal(y, 2 * x)


def test_launch_attributes(x):
    y = torch.zeros_like(x)
    with gpuless.gpu("sm_90a"):
        add[(1,)](x, x, torch.zeros_like(x), 100, BLOCK=128)  # so that what ran before wrote nothing at y's address
        add[(1,)](x, x, y, 100, BLOCK=128, launch_pdl=True)
        assert torch.equal(y, 2 * x)
        add[(1,)](x, y, y, 100, BLOCK=128, launch_cooperative_grid=True)
    assert torch.equal(y, 3 * x)


def test_hooks_see_launches(x):
    seen = []

    def hook(lazy):
        seen.append(lazy.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        with gpuless.gpu("sm_80"):
            add[(1,)](x, x, x.clone(), 100, BLOCK=128)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ["add"]


def test_an_empty_grid_runs_nothing(x):
    with gpuless.gpu("sm_80") as device:
        add[(0,)](x, x, x, 100, BLOCK=128)
    assert device.counters["launches"] == 0


def test_pointers_in_memory_need_their_storage_registered(x):
    table = torch.tensor([x.data_ptr(), x.data_ptr()])
    y = torch.zeros_like(x)
    with gpuless.gpu("sm_80") as device:
        with pytest.raises(gpuless.Finding):
            sum_of_pointers[(1,)](table, y, 100, BLOCK=128)
        device.register(x, "x")
        sum_of_pointers[(1,)](table, y, 100, BLOCK=128)
    assert torch.equal(y, 2 * x)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("guard", [False, True])
def test_descriptors_of_the_host(arch, dtype, guard):
    x = torch.arange(48 * 80).remainder(100).view(48, 80).to(dtype)
    y = torch.zeros_like(x)
    with gpuless.gpu(arch, guard=guard):
        descriptors = [TensorDescriptor.from_tensor(t, [16, 64]) for t in (x, y)]
        copy_by_descriptor[(3, 2)](*descriptors, BM=16, BN=64)
    assert torch.equal(x, y)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_descriptors_of_the_device_need_an_allocator(arch):
    x = torch.randn(48, 80)
    y = torch.zeros_like(x)
    with gpuless.gpu(arch):
        if arch == "sm_90a":
            with pytest.raises(RuntimeError, match="no allocator was set"):
                copy_by_descriptor_made_in_the_kernel[(3, 2)](x, y, 48, 80, BM=16, BN=64)
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
        try:
            copy_by_descriptor_made_in_the_kernel[(3, 2)](x, y, 48, 80, BM=16, BN=64)
        finally:
            triton.set_allocator(triton.runtime._allocation.NullAllocator())
    assert torch.equal(x, y)


def test_other_devices_are_refused(x):
    with gpuless.gpu("sm_80"), pytest.raises(ValueError, match="takes CPU tensors"):
        add[(1,)](x.to("meta"), x, x, 100, BLOCK=128)


def test_tensors_seen_as_another_type():
    bits = torch.arange(16, dtype=torch.int32)
    with gpuless.gpu("sm_80"):
        scale_by_half[(1,)](triton.reinterpret(bits, tl.float32), 2.0, 16, BLOCK=128)
    assert torch.equal(bits.view(torch.float32), 2 * torch.arange(16, dtype=torch.int32).view(torch.float32))
