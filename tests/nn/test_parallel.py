"""Quantised layers divided between two processes by `fp.nn.ColwiseParallel` and `RowwiseParallel`."""

import copy
import pickle

import pytest
import ranks
import torch
from ranks import SIZE
from rotation import paired
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import forwardpass as fp
from forwardpass.nn.linear.sharding import INPUTS, Sharding
from forwardpass.ops.common.quantized_rows import E4M3

KINDS = {
    "int8": (fp.nn.Int8Linear, {}),
    "symmetric": (fp.nn.Int8Linear, {"symmetric": True}),
    "static": (fp.nn.Int8Linear, {"input_scale": torch.tensor([0.03]), "input_zero_point": torch.tensor([-5])}),
    "smoothed": (fp.nn.Int8Linear, {"channel_scale": True}),
    "w8a16": (fp.nn.W8A16Linear, {}),
    "w8a16_e4m3": (fp.nn.W8A16Linear, {"weight_dtype": E4M3}),
    "w8a16_group": (fp.nn.W8A16Linear, {"scales": "group"}),
    "fp8": (fp.nn.Fp8Linear, {}),
    "fp8_tensor": (fp.nn.Fp8Linear, {"scales": "tensor"}),
    "fp8_block": (fp.nn.Fp8Linear, {"scales": "block"}),
    "fp8_smoothed": (fp.nn.Fp8Linear, {"channel_scale": True}),
    "bf16": (fp.nn.Bf16Linear, {}),
}


@pytest.fixture(scope="module")
def processes():
    pool = ranks.Ranks()
    yield pool
    pool.close()


def layer_of(kind, k, n, bias=True, activation=None, dtype=torch.float32):
    """The same on every rank."""
    cls, options = KINDS[kind]
    torch.manual_seed(k + n)
    if "channel_scale" in options:
        options = {"channel_scale": torch.rand(k) + 0.5}
    return cls.from_torch(nn.Linear(k, n, bias).to(dtype), activation=activation, **options).eval()


def kernel_error(layer, dtype, magnitude, y):
    """What a kernel may be off by: sums in float32 of K terms, each rank's rounded to what it is written in (bfloat16 by
    `Bf16Linear`'s own product), the bias, the sum of ranks, the output."""
    written = torch.bfloat16 if isinstance(layer, fp.nn.Bf16Linear) else dtype
    terms = layer.qweight.shape[1] + 8
    return magnitude * (terms * 2**-24 + torch.finfo(written).eps) + y.abs() * 2 * torch.finfo(dtype).eps


def close(layer, y, expected, magnitude):
    bound = kernel_error(layer, y.dtype, magnitude, expected)
    assert y.shape == expected.shape
    worst = ((y.double() - expected).abs() / bound.clamp(min=1e-30)).max().item() if y.numel() else 0.0
    assert worst <= 1, worst


def row_wise(kind, k, n, bias, dtype):
    layer, mesh = layer_of(kind, k, n, bias, dtype=dtype), ranks.mesh()
    divided = copy.deepcopy(layer)
    parallelize_module(divided, mesh, fp.nn.RowwiseParallel())
    columns = torch.arange(k).chunk(SIZE)[mesh.get_local_rank()]
    assert divided.qweight.shape == (n, len(columns)) and divided.in_features == len(columns)
    assert (divided.bias is not None) == (bias and mesh.get_local_rank() == 0)
    for shape in ((5, k), (2, 3, k), (1, k), (0, k)):
        x = torch.randn(shape, dtype=dtype)
        x[..., 3 % k] *= 30
        with torch.inference_mode():
            y, (expected, magnitude) = divided(x[..., columns]), ranks.slices(layer, x)
        assert y.dtype == dtype
        close(layer, y, expected, magnitude)
        torch.testing.assert_close(divided.exact(x[..., columns]), expected, rtol=1e-9, atol=1e-9)


def column_wise(kind, k, n, bias, dtype):
    layer, mesh = layer_of(kind, k, n, bias, "gelu", dtype), ranks.mesh()
    for output in (None, Replicate()):
        divided = copy.deepcopy(layer)
        parallelize_module(divided, mesh, fp.nn.ColwiseParallel(output_layouts=output))
        rows = torch.arange(n).chunk(SIZE)[mesh.get_local_rank()]
        assert divided.qweight.shape == (len(rows), k)
        for shape in ((5, k), (2, 3, k), (0, k)):
            x = torch.randn(shape, dtype=dtype)
            with torch.inference_mode():
                y, expected = divided(x), layer(x)
            expected = expected if output else expected[..., rows]
            if kind == "bf16":  # of torch's product, whose sums go by sizes
                torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7)
            else:
                torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps * 4, atol=1e-5)


@pytest.mark.every(2)
@pytest.mark.parametrize(("way", "kind"), paired([row_wise, column_wise], KINDS))
def test_two_processes_compute_what_one_does(processes, way, kind):
    sizes = [(512, 256)] if kind in ("w8a16_group", "fp8_block") else [(64, 48), (71, 51)]
    for k, n in sizes:
        for bias in (True, False):
            for dtype in (torch.float32, torch.bfloat16):
                if not (kind == "bf16" and dtype == torch.bfloat16):
                    processes.run(way, kind, k, n, bias, dtype)


def nan_stays():
    mesh = ranks.mesh()
    layer = layer_of("int8", 64, 32)
    parallelize_module(layer, mesh, fp.nn.RowwiseParallel())
    x = torch.randn(3, 32)
    if mesh.get_local_rank() == 1:
        x[1, 4] = torch.nan  # one rank's slice makes the sum NaN
    y = layer(x)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def layouts():
    """Inputs that are to be divided or gathered first, outputs that are to be divided, and DTensors."""
    mesh = ranks.mesh()
    rank, layer = mesh.get_local_rank(), layer_of("w8a16", 64, 32)
    x = torch.randn(2, 4, 64)
    expected = layer(x)

    def divided(style):
        part = copy.deepcopy(layer)
        parallelize_module(part, mesh, style)
        return part

    row, column = fp.nn.RowwiseParallel, fp.nn.ColwiseParallel
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(divided(row(input_layouts=Replicate()))(x), expected, **near)
    scattered = divided(row(output_layouts=Shard(1)))(x.chunk(2, -1)[rank])
    torch.testing.assert_close(scattered, expected.chunk(2, 1)[rank], **near)
    gathered = divided(column(input_layouts=Shard(1), output_layouts=Replicate()))(x.chunk(2, 1)[rank])
    torch.testing.assert_close(gathered, expected, **near)
    whole = divided(column(use_local_output=False))(DTensor.from_local(x, mesh, [Replicate()]))
    assert isinstance(whole, DTensor) and whole.placements == (Shard(2),)
    torch.testing.assert_close(whole.full_tensor(), expected, **near)


def weights_of_rank_0():
    """As torch's styles do, unless src_data_rank says that each has its own."""
    mesh = ranks.mesh()
    x = torch.randn(4, 64)
    expected = layer_of("int8", 64, 32)(x)
    for source in (0, None):
        layer = layer_of("int8", 64, 32)
        if mesh.get_local_rank():
            layer.qweight.zero_()
        parallelize_module(layer, mesh, fp.nn.ColwiseParallel(output_layouts=Replicate()), src_data_rank=source)
        y = layer(x)
        assert torch.equal(y, expected) == (source == 0)


def copies():
    mesh = ranks.mesh()
    layer = layer_of("int8", 64, 32)
    parallelize_module(layer, mesh, fp.nn.RowwiseParallel())
    x = torch.randn(3, 32)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(x), layer(x))
    ranks.refused(lambda: pickle.dumps(layer), TypeError, "store the whole model")
    assert torch.equal(layer(x.half()).float(), layer(x.half()).float()) and layer(x.half()).dtype == torch.float16


def refusals():
    mesh = ranks.mesh()
    row, column = fp.nn.RowwiseParallel(), fp.nn.ColwiseParallel()

    def refused(layer, style, text, error=ValueError):
        before = {name: t.clone() for name, t in layer.named_buffers()}
        ranks.refused(lambda: parallelize_module(layer, mesh, style), error, text)
        assert all(torch.equal(t, before[name]) for name, t in layer.named_buffers())

    refused(layer_of("int8", 64, 32, activation="gelu"), row, "sums over processes, and it computes gelu")
    refused(layer_of("int8", 1, 32), row, "give some of them none")
    refused(layer_of("int8", 32, 1), column, "give some of them none")
    refused(layer_of("fp8_block", 192, 256), row, "parts of 96 are no multiple of 128")
    refused(layer_of("fp8_block", 256, 192), column, "parts of 96 are no multiple of 128")
    refused(layer_of("w8a16_group", 130, 64), row, "parts of 65 are no multiple of 128")
    twice = layer_of("int8", 64, 32)
    parallelize_module(twice, mesh, column)
    refused(twice, column, "a part already")
    up, down = layer_of("int8", 64, 32, activation="gelu"), layer_of("int8", 32, 64)
    refused(fp.nn.MLP.from_layers(up, down), column, "name each of its layers, up, down", TypeError)
    gate, up, down = layer_of("int8", 64, 24, activation="silu"), layer_of("int8", 64, 24), layer_of("int8", 24, 64)
    refused(fp.nn.GatedMLP.from_layers(gate, up, down).gate_up, column, "8 of gate and 8 of up by turns")
    unknown = layer_of("int8", 64, 32)
    unknown.register_buffer("outliers", torch.zeros(4))
    refused(unknown, column, "outliers is of outputs or of inputs")


def other_modules():
    """What is no quantised layer is torch's to divide."""
    mesh = ranks.mesh()
    linear = nn.Linear(8, 4)
    x, expected = torch.randn(2, 8), linear.weight.detach().clone()
    expected = x @ expected.t() + linear.bias.detach()
    parallelize_module(linear, mesh, fp.nn.ColwiseParallel(output_layouts=Replicate()))
    assert isinstance(linear.weight, DTensor)
    torch.testing.assert_close(linear(x), expected)


@pytest.mark.every(2)
@pytest.mark.parametrize("function", [nan_stays, layouts, weights_of_rank_0, copies, refusals, other_modules])
def test_parts(processes, function):
    processes.run(function)


@pytest.mark.every(3)
def test_halves_of_one_layer_are_divided_each_by_itself():
    """As transformers' packed styles do, with any number of processes; here without any."""

    class Mesh:
        def __init__(self, rank, ranks):
            self.get_local_rank, self.size = (lambda: rank), (lambda: ranks)

    x = torch.randn(3, 64)
    layer = layer_of("int8", 64, 48)
    gate, up = layer(x).chunk(2, -1)
    parts = []
    for rank in range(3):
        part = copy.deepcopy(layer)
        Sharding(Mesh(rank, 3), 0, Replicate(), Shard(-1), packed=2).divide(part)
        parts.append(part(x).chunk(2, -1))
    assert torch.equal(torch.cat([p[0] for p in parts], -1), gate)
    assert torch.equal(torch.cat([p[1] for p in parts], -1), up)
    with pytest.raises(ValueError, match="3 processes: 2 inputs give some of them none"):
        Sharding(Mesh(0, 3), INPUTS, Shard(-1), Replicate()).divide(layer_of("int8", 2, 48))
