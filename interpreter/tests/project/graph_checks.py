"""CUDA graphs of a project that says device="cuda": test_pytest_gpu.py runs these with --gpu."""

import copy

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl


@triton.jit
def doubled_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


def doubled(x):
    out = torch.empty_like(x)
    doubled_kernel[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), BLOCK=256)
    return out


def captured(function):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        out = function()
    assert not torch.cuda.is_current_stream_capturing()
    return graph, out


def test_replays_compute_from_what_is_there():
    x, total = torch.ones(5, 100, device="cuda"), torch.zeros((), device="cuda")

    def function():
        y = doubled(x + 1)
        total.add_(y.sum())
        return y, F.softmax(y, -1), y.topk(3), torch.cat([y, y])[1:3].t().contiguous()

    graph, out = captured(function)
    assert total.item() == 0 and all(t.isnan().all() for t in (*out[:2], out[2].values))  # nothing was done
    for n, value in enumerate((3.0, torch.randn(5, 100, device="cuda"), 2.0)):
        x.copy_(torch.as_tensor(value, device="cuda").expand(5, 100))
        before, expected = total.clone(), 2 * (x + 1)
        graph.replay()
        torch.testing.assert_close(total, before + expected.sum())
        y, soft, top, cat = out
        assert torch.equal(y, expected) and torch.equal(soft, F.softmax(y, -1)), n
        assert torch.equal(top.values, y.topk(3).values) and torch.equal(cat, torch.cat([y, y])[1:3].t())


VIEWS = {
    "t": lambda x: x.t(), "expand": lambda x: x[None].expand(2, 3, 4), "diagonal": lambda x: x.diagonal(),
    "unfold": lambda x: x.unfold(1, 2, 1), "split": lambda x: x.split(2)[1], "unbind": lambda x: x.unbind()[1],
    "view": lambda x: x.view(4, 3), "dtype": lambda x: x.view(torch.int32), "detach": lambda x: x.detach(),
    "real": lambda x: torch.view_as_complex(x.view(6, 2)).real, "imag": lambda x: torch.view_as_complex(x.view(6, 2)).imag,
    "conj": lambda x: torch.view_as_real(torch.view_as_complex(x.view(6, 2)).conj().conj()), "alias": torch.ops.aten.alias,
    "squeeze": lambda x: x[:, None].squeeze(1), "narrow": lambda x: x.narrow(0, 1, 2), "chunk": lambda x: x.chunk(2, 1)[1],
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_views(name):
    x = torch.randn(3, 4, device="cuda")
    graph, view = captured(lambda: VIEWS[name](x).zero_())
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and x.ne(0).any()
    graph.replay()
    assert view.eq(0).all() and VIEWS[name](x).eq(0).all()


def test_numbers_are_those_of_the_capture():
    x, factor = torch.ones(3, device="cuda"), torch.tensor(2.0)
    graph, out = captured(lambda: x * factor)
    factor.fill_(5)
    graph.replay()
    assert out.eq(2).all()


def test_outputs_that_are_resized():
    x, out = torch.ones(3, device="cuda"), torch.empty(0, device="cuda")
    graph, _ = captured(lambda: torch.add(x, 1, out=out))
    assert out.shape == (3,)
    graph.replay()
    assert out.eq(2).all()


def test_random_numbers_are_new():
    graph, out = captured(lambda: torch.rand(100, device="cuda"))
    graph.replay()
    first = out.clone()
    graph.replay()
    assert first.ne(out).any() and out.ge(0).all()


def test_copies_that_do_not_wait():
    host, device = torch.arange(4.0).pin_memory(), torch.zeros(4, device="cuda")
    graph, _ = captured(lambda: (device.copy_(host, non_blocking=True), device.add_(1)))
    host.fill_(7)
    graph.replay()
    assert device.eq(8).all()


@triton.autotune([triton.Config({"BLOCK": b}) for b in (64, 128)], key=["n"])
@triton.jit
def tuned_kernel(x, n, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 1.0, mask=tl.arange(0, BLOCK) < n)


PROHIBITED = {
    "item": lambda x: x.sum().item(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "to the CPU": lambda x: x.cpu(),
    "from the CPU": lambda x: torch.arange(3.0).cuda(),
    "indices of the CPU": lambda x: x[torch.tensor([0, 1])],
    "synchronize": lambda x: torch.cuda.synchronize(),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "autotuning": lambda x: tuned_kernel[(1,)](x, 7),
    "shapes": lambda x: x @ x,
    "a graph in a graph": lambda x: captured(lambda: x + 1),
}


@pytest.mark.parametrize("name", PROHIBITED)
def test_prohibited(name):
    x = torch.ones(7, 3, device="cuda")
    with pytest.raises(RuntimeError, match=r"previous error during capture|operation not permitted") as error:
        captured(lambda: PROHIBITED[name](x))
    assert "operation not permitted when stream is capturing" in str(error.value.__context__ or error.value)
    assert doubled(x).eq(2).all() and not torch.cuda.is_current_stream_capturing()


def test_misuse():
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()
    with pytest.raises(NotImplementedError, match="debug_dump"):
        graph.debug_dump("graph.dot")
    assert copy.copy(torch.cuda.graph_pool_handle()) != torch.cuda.graph_pool_handle()


def test_graphed_module():
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.LayerNorm(32), torch.nn.ReLU(), torch.nn.Linear(32, 4)
    ).cuda()
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(plain), (torch.randn(8, 16, device="cuda"),))
    for _ in range(2):
        x, gradients = torch.randn(8, 16, device="cuda"), []
        for model in (plain, graphed):
            model.zero_grad()
            model(x).square().sum().backward()
            gradients.append([p.grad for p in model.parameters()])
        for eager, replayed in zip(*gradients):
            torch.testing.assert_close(replayed, eager)
