"""transform_config of compressed-tensors: rotated inputs, read from files that the library makes, and written for it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import outputs
from stored_formats import edit, layers_of, llama, mixture, write, write_compressed

import forwardpass as fp
from forwardpass.ops.common.rotation import SIZES, SignedRotation, hadamard, rotate, sylvester

X = {"input_ids": torch.arange(3, 35).reshape(2, 16)}
DOWN, ALL = r"re:.*down_proj$", "Linear"


def scheme(size, targets=ALL, type="hadamard", **options):
    """Inputs and, in the file already, weights."""
    apply = [{"targets": [targets], "location": where, "inverse": inverse, "ignore": ["lm_head"]}
             for where, inverse in (("input", False), ("weight_input", True))]  # fmt: skip
    return {"type": type, "head_dim": size, "apply": apply} | options


def attention_scheme(*locations):
    apply = [{"targets": ["re:.*self_attn$"], "location": where} for where in locations]
    return {"type": "hadamard", "head_dim": 64, "apply": apply}


def transformed(folder, **schemes):
    """What the library writes of a W8A8 model whose weights it has transformed; the output of that model's floats."""
    transform = pytest.importorskip("compressed_tensors.transform")
    model = llama(intermediate_size=384)
    expected = outputs(model, X)
    config = transform.TransformConfig(config_groups=schemes)
    torch.manual_seed(1)
    transform.apply_transform_config(model, config)
    assert (outputs(model, X) - expected).norm() < 1e-4 * expected.norm()
    write_compressed(folder, "W8A8", model)
    return expected


def effective(file, fqn, matrix, size):
    """A layer's weight as it multiplies inputs that are not rotated, in float64."""
    weight = file[f"{fqn}.weight"].double() * file[f"{fqn}.weight_scale"].double()
    return (weight.unflatten(1, (-1, size)) @ matrix.double().T / size**0.5).flatten(1)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("name", "schemes", "sizes"),
    [
        ("all", {"v": scheme(64)}, {64: 14}),
        ("down", {"R4": scheme(128, DOWN)}, {None: 12, 128: 2}),
        ("random", {"v": scheme(128, type="random-hadamard")}, {128: 14}),
        ("whole", {"v": scheme(None, r"re:.*(q|up)_proj$", "random-hadamard")}, {None: 10, 256: 4}),
        ("two", {"v": scheme(256, r"re:.*self_attn\..*_proj$"), "R4": scheme(64, DOWN)}, {256: 8, None: 4, 64: 2}),
    ],
)
@torch.inference_mode()
def test_what_the_library_writes(name, schemes, sizes, tmp_path):
    """Each weight is that of the file times the library's own matrix, and the output that of the floats."""
    with torch.inference_mode(False):
        expected = transformed(tmp_path, **schemes)
    model = fp.load_pretrained(tmp_path)
    layers, file = layers_of(model), load_file(tmp_path / "model.safetensors")
    counted = [layer.rotate for layer in layers.values()]
    assert {size: counted.count(size) for size in counted} == sizes
    assert (outputs(model, X).float() - expected).norm() < 0.06 * expected.norm()
    matrices = {t.shape[0]: t for n, t in file.items() if n.endswith("_input.weight")}
    for fqn, layer in layers.items():
        if layer.rotate is not None:
            wanted = effective(file, fqn, matrices[layer.rotate], layer.rotate)
            weight = rotate(layer._dequantized_weight(), layer.rotate)
            if layer.channel_scale is not None:
                weight *= layer.channel_scale
            off = (weight - wanted).norm(dim=1)
            clamped = (file[f"{fqn}.weight"] == -128).sum(1)  # of those whose signs change: 127 in the place of 128
            assert (off <= clamped.sqrt() * file[f"{fqn}.weight_scale"][:, 0].double() * 1.001 + 1e-12).all()
            assert (off < 1e-12).float().mean() > 0.5
    fp.save_pretrained(model, tmp_path / "ours")
    assert torch.equal(outputs(fp.load_pretrained(tmp_path / "ours"), X), outputs(model, X))
    for layer in layers.values():  # and forgotten it shows
        layer.rotate = None
    assert (outputs(model, X).float() - expected).norm() > 0.1 * expected.norm()


@torch.inference_mode()
def test_without_a_matrix_in_the_file(tmp_path):
    """Sylvester's is known; of a random one nothing is."""
    with torch.inference_mode(False):
        transformed(tmp_path, R4=scheme(128, DOWN))
    expected, path = outputs(fp.load_pretrained(tmp_path), X), tmp_path / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "R4" not in n}, path, metadata={"format": "pt"})
    assert torch.equal(outputs(fp.load_pretrained(tmp_path), X), expected)
    change(tmp_path, {"R4": scheme(128, DOWN, "random-hadamard")})
    with pytest.raises(ValueError, match=r"matrix of its inputs .R4. is missing from the file"):
        fp.load_pretrained(tmp_path)


def change(folder, schemes, **entries):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(folder, quantization_config=config | {"transform_config": {"config_groups": schemes}} | entries)


@torch.inference_mode()
def test_what_leaves_no_trace(tmp_path):
    """Weights are in the file as they are; q R (k R)^T is q k^T."""
    write(tmp_path, "int8_token")
    expected = outputs(fp.load_pretrained(tmp_path), X)
    offline = {"type": "random-matrix", "apply": [{"targets": ALL, "location": "weight_output"}]}
    change(tmp_path, {"R1": offline, "R3": attention_scheme("q_attn", "k_cache")})
    assert torch.equal(outputs(fp.load_pretrained(tmp_path), X), expected)


#: name -> (schemes, words, a format of FORMATS)
REFUSED = {
    "outputs": ({"u": {"type": "hadamard", "apply": [{"targets": [ALL], "location": "output"}]}}, "rotates at 'output' .u."),
    "queries alone": ({"R3": attention_scheme("q_attn")}, "rotates at 'q_attn' .R3."),
    "unknown": ({"R5": attention_scheme("residual")}, "rotates at 'residual' .R5."),
    "all inputs": ({"R4": scheme(None, DOWN)}, "its 384 inputs are to be rotated 384 at a time .R4., and kernels"),
    "small": ({"R4": scheme(32, DOWN)}, "384 inputs are to be rotated 32 at a time"),
    "no divisor": ({"R4": scheme(256, DOWN)}, "384 inputs are to be rotated 256 at a time"),
    "other matrix": ({"R4": scheme(128, DOWN, "random-matrix")}, "multiplied by a 'random-matrix' matrix .R4."),
    "no order": ({"R4": scheme(128, DOWN, randomize=True)}, "matrix of its inputs .R4. is missing"),
    "floats": ({"v": scheme(64, "lm_head") | {"apply": [{"targets": ["lm_head"], "location": "input"}]}},
               "lm_head: its inputs are to be rotated .transform_config., and it holds floats"),
    "twice": ({"v": scheme(64), "R4": scheme(128, DOWN)}, "rotated twice .v, R4."),
    "nothing": ({"v": {"type": "hadamard"}}, "transform_config has 'v', which applies nothing that is known"),
    "weights alone": ({"v": scheme(64)}, "its inputs are to be rotated, and stay floats", "int8_packed"),
    "fp8 on a CPU": ({"v": scheme(64)}, "its inputs are rotated, and stay floats on cpu", "fp8_token"),
}  # fmt: skip


@pytest.mark.every(2)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    schemes, words, *form = REFUSED[name]
    write(tmp_path, *form or ["int8_token"])
    change(tmp_path, schemes)
    with pytest.raises(ValueError, match=words) as e:
        fp.load_pretrained(tmp_path)
    assert "\n" not in str(e.value)


def test_experts(tmp_path):
    """One projection of one of them, by its name in the file."""
    write(tmp_path, "int8_token", mixture("Qwen3MoeForCausalLM"))
    change(tmp_path, {"R4": scheme(64, r"re:.*experts\.2\.down_proj$")})
    with pytest.raises(ValueError, match=r"mlp\.experts: inputs of its experts are to be rotated .transform_config."):
        fp.load_pretrained(tmp_path)


def test_an_order_is_no_matrix_of_ours(tmp_path):
    """randomize=: rows change their places, which no signs of inputs do."""
    transformed(tmp_path, R4=scheme(128, DOWN, randomize=True))
    with pytest.raises(ValueError, match=r"rotated by a matrix .R4. that is not ours"):
        fp.load_pretrained(tmp_path)


@torch.inference_mode()
def test_fp8_where_it_is_multiplied(tmp_path):
    write(tmp_path, "fp8_token")
    change(tmp_path, {"v": scheme(64)})
    with fp.interpret("sm_89"):
        layer = fp.load_pretrained(tmp_path).model.layers[0].self_attn.q_proj
    assert type(layer) is fp.nn.Fp8Linear and layer.rotate == 64 and layer.channel_scale is not None


@pytest.mark.parametrize("size", SIZES)
def test_matrices(size):
    """Sylvester's and ours, with rows of any signs and columns in any order; not with rows in another order."""
    x, generator = torch.randn(3, 2 * size, dtype=torch.float64), torch.Generator().manual_seed(size)
    signs, order = (
        torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1,
        torch.randperm(size, generator=generator),
    )
    plain = sylvester(size)
    for m in (
        plain,
        hadamard(size).sign(),
        signs[:, None] * plain,
        (signs[:, None] * plain)[:, order] * signs,
        plain.T,
    ):
        found = SignedRotation.of(m)
        expected = (x.unflatten(-1, (2, size)) @ m.double() / size**0.5).flatten(-2)
        scale = found.channel_scale(2 * size, torch.device("cpu"))
        assert (scale is None) == torch.equal(m, hadamard(size).sign())
        rotated = rotate(x if scale is None else x * scale, size).unflatten(-1, (2, size))
        torch.testing.assert_close((rotated[..., found.order] * found.flips).flatten(-2), expected)
        q = torch.randint(-127, 128, (5, 2 * size), dtype=torch.int8)
        moved = found.weight(q)
        torch.testing.assert_close(rotated.flatten(-2) @ moved.double().T, expected @ q.double().T)
        assert torch.equal(
            found.weight(q.float().to(torch.float8_e4m3fn)).float(),
            found.weight(q.float().to(torch.float8_e4m3fn).float()),
        )
    assert found.weight(torch.full((1, size), -128, dtype=torch.int8)).unique().tolist() in ([-128], [-128, 127])
    for m in (plain[order], plain[order][:, order], torch.eye(size), plain / 2, torch.ones(size, size)):
        assert SignedRotation.of(m) is None


@pytest.mark.every(2)
@pytest.mark.parametrize("calibrated", [False, True])
@torch.inference_mode()
def test_written_for_the_library(calibrated, tmp_path):
    """Read again by us, and by the library's own transforms around the file's weights in floats."""
    transform = pytest.importorskip("compressed_tensors.transform")
    model = llama(intermediate_size=384, tie_word_embeddings=False)
    floats = outputs(model, X)
    batches = [
        {"input_ids": torch.randint(3, 100, (4, 32), generator=torch.Generator().manual_seed(i))} for i in range(2)
    ]
    fp.swap(model, "int8_rotated", calibrate=batches if calibrated else None)
    y = outputs(model, X)
    with pytest.warns(UserWarning, match=r"inputs of 14 layers are rotated .transform_config."):
        fp.export_pretrained(model, tmp_path)
    again = fp.load_pretrained(tmp_path)
    assert {layer.rotate for layer in layers_of(again).values()} == {128, 256}
    assert all(layer.channel_scale is None for layer in layers_of(again).values())
    if calibrated:  # behind a norm its layers share one scale
        assert (outputs(again, X) - floats).norm() < 1.5 * (y - floats).norm()
    else:
        assert torch.equal(outputs(again, X), y)

    file = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["transform_config"]
    with torch.inference_mode(False):
        theirs = llama(intermediate_size=384, tie_word_embeddings=False)
        transform.apply_transform_config(theirs, transform.TransformConfig(**config))
    scales = {n.removesuffix("_scale"): t for n, t in file.items() if n.endswith(".weight_scale")}
    state = {n: t.float() * scales[n] if n in scales else t for n, t in file.items() if not n.endswith("_scale")}
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    assert (outputs(theirs, X) - floats).norm() < 0.03 * floats.norm()
    assert sum("rotate_" in name for name in file) == 2  # one matrix of each size
