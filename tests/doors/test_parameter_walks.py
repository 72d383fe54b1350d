"""What goes over the parameters of a model finds a swapped one as it finds its Linears: FSDP, accelerate, optimizers."""

import copy

import pytest
import ranks
import torch
from small_models import MLPS, batch, build, outputs
from torch import nn

import forwardpass as fp


def model():
    torch.manual_seed(0)
    layers = nn.Embedding(10, 64), nn.Linear(64, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 64)
    swapped = nn.Sequential(*layers).eval()
    fp.swap(swapped, "int8", include="**")
    return swapped


X = torch.tensor([[1, 2, 3]])


@torch.no_grad()
def sharded():
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    expected = model()(X)
    shards = model()
    fully_shard(shards[1])
    fully_shard(shards)
    assert torch.equal(shards(X), expected)
    for options in ({}, {"use_orig_params": True}):
        assert torch.equal(FullyShardedDataParallel(model(), device_id=torch.device("cpu"), **options)(X), expected)


@pytest.mark.every(3)
def test_fsdp():
    pool = ranks.Ranks()
    try:
        pool.run(sharded)
    finally:
        pool.close()


@torch.no_grad()
def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    expected = model()(X)
    dispatched = accelerate.dispatch_model(model(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(dispatched(X), expected)
    assert torch.equal(accelerate.cpu_offload(model(), torch.device("cpu"))(X), expected)
    assert accelerate.infer_auto_device_map(model(), {"cpu": 10**9}) == {"": "cpu"}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_accelerate_offloads_integers(name, tmp_path):
    """A gated MLP raised KeyError: 'model.layers.0.mlp.gate_up.qweight'."""
    accelerate = pytest.importorskip("accelerate")
    model, x = build(name, MLPS), batch(name)
    fp.swap(model, "int8", include="**", exclude="lm_head", attention=False)
    expected = outputs(model, x)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), torch.device("cpu"), offload_buffers=True)
    integers = [t for layer in offloaded.modules() for n, t in layer._buffers.items() if n == "qweight"]
    assert integers and all(t.is_meta for t in integers)
    for _ in range(2):
        assert torch.equal(outputs(offloaded, x), expected)
    on_disk = accelerate.disk_offload(model, tmp_path, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(outputs(on_disk, x), expected)


def test_optimizers_and_flags():
    swapped = model()
    assert all(p.requires_grad for p in swapped.parameters())
    optimizer = torch.optim.AdamW(swapped.parameters())
    swapped.requires_grad_(False)
    optimizer.step()
    nn.utils.clip_grad_norm_(swapped.parameters(), 1.0)
    assert sum(p.numel() for p in swapped.parameters()) == 640 + 128
    assert {p.dtype for p in swapped.bfloat16().parameters()} == {torch.bfloat16}
