"""rotate=: blocks of columns times a Hadamard matrix before rows are quantised, and the layers and files that have it."""

import copy
import io

import pytest
import torch
from every_backend import interpreted
from torch import nn

import forwardpass as fp
from forwardpass.calibration.formulas import LayerStatistics, rotated_moment
from forwardpass.dispatch import operations
from forwardpass.ops.common.quantized_rows import E4M3
from forwardpass.ops.common.rotation import SIZES, fitting, hadamard, rotate
from forwardpass.testing import awkward

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_120")
H4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
H2 = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64) / 2**0.5


def by_kronecker(size):
    matrix = H4
    for _ in range({64: 2, 128: 2, 256: 3}[size]):
        matrix = torch.kron(H4, matrix)
    return torch.kron(H2, matrix) if size == 128 else matrix


@pytest.mark.parametrize("size", SIZES)
def test_matrix(size):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix, by_kronecker(size), rtol=1e-15, atol=0)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(matrix, matrix.T)
    x = torch.randn(3, 3 * size, dtype=torch.float64)
    expected = (x.unflatten(-1, (3, size)) @ matrix).flatten(-2)
    torch.testing.assert_close(rotate(x, size), expected, rtol=0, atol=1e-13)


@pytest.mark.every(2)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_bits_where_no_tensor_core_adds(size, symmetric):
    """On a CPU (of other vectors: test_cpu_tiers.py), and in Triton."""
    x = awkward((7, 3 * size), torch.bfloat16, 5)
    args = (x, torch.int8, None, None, None, symmetric, torch.rand(3 * size) + 0.25, size)
    expected = operations["quantize"].runs["reference"](*args)
    for got in (
        torch.ops.forwardpass.quantize_cpu(*args),
        interpreted(operations["quantize"], args, "triton", "sm_80", 1),
    ):
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_few_steps_differ_on_a_gpu(arch):
    """Sums within the rotation are rounded to tf32: of random values a q in some hundreds is a step off."""
    x = torch.randn(16, 768)
    for size in SIZES:
        args = (x, torch.int8, None, None, None, True, None, size)
        got = interpreted(operations["quantize"], args, "cuda", arch, 0)
        off = (got[0].int() - operations["quantize"].runs["reference"](*args)[0].int()).abs()
        assert off.max() <= 1 and off.float().mean() < 0.03


@pytest.mark.every(2)
@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
@pytest.mark.parametrize("name", ["int8_linear", "fp8_linear"])
def test_linears_are_quantize_and_a_product(name, backend):
    if name == "fp8_linear" and backend == "cpu":
        backend = "reference"
    dtype = torch.int8 if name == "int8_linear" else E4M3
    x, weight = torch.randn(5, 512), torch.randn(48, 512)
    w, weight_scale, _ = fp.ops.quantize(rotate(weight, 256), dtype)
    linear, gemm = getattr(fp.ops, name), getattr(fp.ops, name.replace("linear", "gemm"))

    def run():
        q, scale, _ = fp.ops.quantize(x, dtype, rotate=256)
        return linear(x, w, weight_scale, rotate=256), gemm(q, w, scale, weight_scale, out_dtype=torch.float32)

    with fp.use_backend(backend):
        if backend in ("cpu", "reference"):
            y, expected = run()
        else:
            with fp.interpret("sm_90a"):
                y, expected = run()
    assert torch.equal(y, expected)
    exact = x @ weight.T
    assert (y - exact).norm() < (0.02 if dtype == torch.int8 else 0.06) * exact.norm()


@pytest.mark.every(2)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda", "triton"])
def test_not_finite_shows_in_the_scale(value, backend):
    x = torch.randn(3, 256)
    x[1, 33] = value
    args = (x, torch.int8, None, None, None, True, None, 64)
    run = operations["quantize"]
    scale = (
        interpreted(run, args, backend, "sm_90a", 0) if backend in ("cuda", "triton") else run.runs[backend](*args)
    )[1]
    assert scale.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        (256, {"rotate": 32}, "must be one of 64, 128, 256"),
        (256, {"rotate": True}, "must be one of 64, 128, 256"),
        (384, {"rotate": 256}, "384 columns are no multiple of rotate=256: use rotate=128"),
        (100, {"rotate": 64}, "use rotate=None"),
        (256, {"rotate": 128, "group_size": 64}, "columns that are rotated together share a scale"),
    ],
)
def test_refuses(columns, options, words):
    with pytest.raises(ValueError, match=words):
        fp.ops.quantize(torch.randn(2, columns), torch.int8, **options)


def outliers(rows, columns):
    """As a language model has them: some channels a hundred times as large as the others."""
    x = torch.randn(rows, columns)
    x[:, ::97] *= 100
    return x


@pytest.mark.every(2)
@pytest.mark.parametrize("cls", [fp.nn.Int8Linear, fp.nn.Fp8Linear])
@torch.inference_mode()
def test_layers(cls):
    linear, x = nn.Linear(384, 96), outliers(64, 384)
    plain, rotated = cls.from_torch(linear), cls.from_torch(linear, rotate=256)
    assert (rotated.rotate, rotated.config()["rotate"], "rotate=128" in repr(rotated)) == (128, 128, True)
    assert "rotate" not in plain.config()
    errors = [float((layer(x) - linear(x)).norm() / linear(x).norm()) for layer in (plain, rotated)]
    if cls is fp.nn.Int8Linear:
        assert errors[1] < errors[0] / 2, errors
    assert errors[1] < 0.06
    assert (rotated.exact(x) - rotated(x)).norm() < 1e-3 * rotated(x).norm()
    assert (rotated.weight - linear.weight).norm() < 0.05 * linear.weight.norm()  # as the floats were, not rotated
    again = cls(**rotated.config())
    again.load_state_dict(rotated.state_dict())
    buffer = io.BytesIO()
    torch.save(rotated, buffer)
    buffer.seek(0)
    for other in (
        again,
        copy.deepcopy(rotated),
        torch.load(buffer, weights_only=False),
        torch.compile(rotated, backend="aot_eager", fullgraph=True),
    ):
        assert torch.equal(other(x), rotated(x))
    assert cls.from_torch(nn.Linear(100, 16), rotate=256).rotate is None


@pytest.mark.parametrize("symmetric", [True, False])
@torch.inference_mode()
def test_beside_static_scales_and_smoothing(symmetric):
    """x times channel_scale, rotated, by one scale: each part shows where it is left out."""
    torch.manual_seed(1)
    linear, x = nn.Linear(512, 96), outliers(64, 512)
    channel_scale = x.abs().amax(0).rsqrt()
    scaled = rotate(x * channel_scale, 256)
    low, high = scaled.min().clamp(max=0), scaled.max().clamp(min=0)
    scale = (scaled.abs().max() / 127 if symmetric else (high - low) / 255).reshape(1)
    zero_point = None if symmetric else (-128 - low / scale).round().int()
    static = {"input_scale": scale, "input_zero_point": zero_point}
    layer = fp.nn.Int8Linear.from_torch(linear, symmetric=symmetric, channel_scale=channel_scale, rotate=256, **static)

    def error(layer):
        return float((layer(x) - linear(x)).norm() / linear(x).norm())

    assert error(layer) < 0.02 and (layer.exact(x) - layer(x)).norm() < 1e-3 * layer(x).norm()
    assert (layer.weight - linear.weight).norm() < 0.02 * linear.weight.norm()
    for name in ("rotate", "channel_scale"):
        other = copy.deepcopy(layer)
        setattr(other, name, None)
        assert error(other) > 0.5
    fp8 = fp.nn.Fp8Linear.from_torch(
        linear, channel_scale=channel_scale, rotate=256, input_scale=scaled.abs().max().reshape(1) / 448
    )
    assert error(fp8) < 0.05


def test_a_rotation_that_is_forgotten_is_seen():
    linear, x = nn.Linear(256, 64, bias=False), torch.randn(8, 256)
    layer = fp.nn.Int8Linear.from_torch(linear, rotate=256)
    layer.rotate = None
    with torch.inference_mode():
        assert (layer(x) - linear(x)).norm() > 0.9 * linear(x).norm()


@torch.inference_mode()
def test_swap_and_folder(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(384, 512), nn.GELU(), nn.Linear(512, 100)).eval()
    x = outliers(32, 384)
    expected, plain = model(x), copy.deepcopy(model)
    fp.swap(plain, "int8")
    fp.swap(model, "int8_rotated")
    assert [model[0].rotate, model[2].rotate] == [128, 256]
    y = model(x)
    assert (y - expected).norm() < 0.5 * (plain(x) - expected).norm()
    fp.save_pretrained(model, tmp_path)
    empty = nn.Sequential(nn.Linear(384, 512), nn.GELU(), nn.Linear(512, 100)).eval()
    assert torch.equal(fp.load_pretrained(tmp_path, model=empty)(x), y)
    fp.restore(model)
    assert torch.equal(model(x), expected)


@torch.inference_mode()
def test_calibrated(tmp_path):
    """Smoothed, rotated, rounded with the rotated inputs' second moment: better than any of these alone, on other inputs."""
    torch.manual_seed(0)
    mixing = torch.randn(384, 384) / 384**0.5  # inputs whose channels go together, as those of models do
    model = nn.Sequential(nn.Linear(384, 256), nn.GELU(), nn.Linear(256, 192)).eval()
    data = [torch.randn(512, 96) @ mixing[:96] * (1 + 40 * (torch.arange(384) % 97 == 0)) for _ in range(2)]
    expected, errors = model(data[1]), {}
    for name in ("int8", "int8_rotated"):
        for calibrate in (None, data[:1]):
            swapped = copy.deepcopy(model)
            fp.swap(swapped, name, calibrate=calibrate)
            y = swapped(data[1])
            errors[name, calibrate is not None] = float((y - expected).norm() / expected.norm())
    best = errors.pop(("int8_rotated", True))
    assert best < 0.95 * errors["int8", True] and best < 0.6 * errors["int8_rotated", False], (best, errors)
    assert swapped[0].channel_scale is not None and [swapped[0].rotate, swapped[2].rotate] == [128, 256]
    fp.save_pretrained(swapped, tmp_path)
    empty = nn.Sequential(nn.Linear(384, 256), nn.GELU(), nn.Linear(256, 192)).eval()
    assert torch.equal(fp.load_pretrained(tmp_path, model=empty)(data[1]), y)


@pytest.mark.parametrize("size", SIZES)
def test_second_moment_of_rotated_rows(size):
    x = torch.randn(50, 512) * torch.linspace(0.1, 9, 512)
    moments = [LayerStatistics(512).update(y).second_moment for y in (x, rotate(x, size))]
    torch.testing.assert_close(
        rotated_moment(moments[0], size), moments[1], rtol=1e-4, atol=1e-5 * float(moments[1].abs().max())
    )


def test_a_precision_by_its_size():
    """The same as the preset of that name, in every place where one is given."""
    linear = nn.Linear(512, 128)
    for size, name in ((256, "int8_rotated"), (128, "int8_rotated_128"), (64, "int8_rotated_64")):
        preset = fp.Precision("int8", rotate=size)
        assert preset.name == name and preset.options["rotate"] == size
        for given in (preset, name, {"0": preset}, lambda fqn, module, preset=preset: preset):
            model = nn.Sequential(copy.deepcopy(linear)).eval()
            report = fp.swap(model, given)
            assert model[0].rotate == size and report.swapped[0].precision == name
        again = nn.Sequential(copy.deepcopy(linear)).eval()
        fp.swap(again, plan=report.plan)
        assert again[0].rotate == size


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fp.Precision("fp8", rotate=256), "no precision 'fp8' with rotate=256: use \"int8\""),
        (lambda: fp.Precision("int8", rotate=32), "no precision 'int8' with rotate=32"),
        (lambda: fp.Precision("int8", 1, fp.nn.Int8Linear, rotate=64), "goes with the name of a preset alone"),
        (lambda: fp.Config(fp.Precision("mine", 1, fp.nn.Int8Linear)), "'mine' .version 1. is not registered"),
        (lambda: fp.Config("int8_rotated_32"), "there is no precision 'int8_rotated_32'"),
    ],
)
def test_refuses_precisions(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("columns", [*range(60, 70), 384, 4096])
def test_fitting(columns):
    assert fitting(columns, 256) == next((n for n in (256, 128, 64) if columns % n == 0), None)
    assert fitting(columns, 64) == (64 if columns % 64 == 0 else None)
    assert fitting(columns, None) is None
