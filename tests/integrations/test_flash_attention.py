"""The door of torch.nn.attention: it can be opened and closed without a GPU, and what is behind it runs on a CPU."""

import pytest
import torch
import torch.nn.functional as F

import forwardpass as fp
from forwardpass.dispatch.calls import Calls, counted
from forwardpass.integrations import flash_attention as flash_attention_impl

OP = torch.ops.aten._scaled_dot_product_flash_attention


@pytest.fixture
def on_cpu():
    activated = flash_attention_impl.activate("CPU")
    yield
    activated.remove()
    activated.remove()
    with pytest.raises(NotImplementedError):  # torch has none for a CPU
        OP(*operands())


def operands(heads=4, rows=6, keys=6):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, s, h, 16, generator=g) for s, h in ((rows, 4), (keys, heads), (keys, heads)))
    return [t.transpose(1, 2) for t in (q, k, v)]


def test_registers_activates_and_restores():
    attention = torch.nn.attention
    assert flash_attention_impl.NAME not in attention.list_flash_attention_impls()  # not by importing
    fp.register_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None
    assert flash_attention_impl.NAME in attention.list_flash_attention_impls()
    attention.activate_flash_attention_impl(flash_attention_impl.NAME)
    try:
        assert attention.current_flash_attention_impl() == flash_attention_impl.NAME
    finally:
        attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}])
@pytest.mark.parametrize("heads", [4, 2])
@torch.inference_mode()
def test_results(on_cpu, options, heads):
    for q, k, v in (operands(heads), [t.contiguous() for t in operands(heads)]):
        with counted(Calls()) as calls:
            o, lse, *rest = OP(q, k, v, **options)
        assert calls.kernel_calls == {"_scaled_dot_product_flash_attention": 1}
        expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != 4, **options)
        torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-6)
        assert o.stride() == torch.empty_like(q).stride()
        s = q @ k.repeat_interleave(4 // heads, 1).mT * options.get("scale", 0.25)
        if "is_causal" in options:
            s = s.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
        torch.testing.assert_close(lse, s.logsumexp(-1), rtol=1e-5, atol=1e-5)
        assert rest[2:4] == [6, 6]
        assert [t.dtype for t in rest[4:6]] == [torch.uint64] * 2


def test_what_it_does_not_take(on_cpu):
    q, k, v = operands()
    for given, code in [
        ((q, k, v, 0.5), "dropout"),
        ((q, k, v, 0.0, False, True), "debug_mask"),
        ((q.clone().requires_grad_(), k, v), "grad"),
    ]:
        with counted(Calls()) as calls, pytest.raises(RuntimeError, match="this torch has nothing else"):
            OP(*given)
        assert [reason.code for _, reason in calls.fallbacks] == [code]


@pytest.mark.gpu
@torch.inference_mode()
def test_on_a_card():
    q, k, v = (torch.randn(2, 4, 100, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    fp.register_flash_attention_impl()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.nn.attention.activate_flash_attention_impl(flash_attention_impl.NAME)
        try:
            with counted(Calls()) as calls:
                got = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                short = F.scaled_dot_product_attention(q[..., :16], k[..., :16], v[..., :16])  # torch's own
        finally:
            torch.nn.attention.restore_flash_attention_impl()
        assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True), expected)
    assert sum(calls.kernel_calls.values()) == 1
    assert [reason.code for _, reason in calls.fallbacks] == ["head_dim"]
    assert short.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
