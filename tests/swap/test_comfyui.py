"""ComfyUI's int8 and fp8 files, made by their formulas, read into a model of the same names."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import assert_same_objects, objects
from torch import nn

import forwardpass as fp
from forwardpass.nn.linear.quantized_linear import quantize_weight
from forwardpass.ops.common.quantized_rows import E4M3


class Dit(nn.Module):
    """A block of a diffusion model."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.qkv, self.proj = nn.Linear(128, 384), nn.Linear(128, 128, bias=False)
        self.mlp = nn.Sequential(nn.Linear(128, 320), nn.GELU(), nn.Linear(320, 128))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


def dit():
    torch.manual_seed(0)
    return Dit().eval()


X = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(1))
SCALE = torch.ones(8)
LAYERS = ("qkv", "proj", "mlp.0", "mlp.2")
H4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
E4M3_FORMAT, INT8_FORMAT = {"format": "float8_e4m3fn"}, {"format": "int8_tensorwise"}


def parts(weight, name):
    """(tensors of a layer, what its weight is, what the file says of it)"""
    if name == "int8 rotated":  # by ConvRot's recipe: a product with the Kronecker power of H4, in fp32
        h = torch.kron(torch.kron(H4, H4), H4)
        q, s = quantize_weight((weight.unflatten(1, (-1, 64)) @ h.T).flatten(1))
        unrotated = ((q.double() * s[:, None]).unflatten(1, (-1, 64)) @ h.double()).flatten(1)
        about = INT8_FORMAT | {"convrot": True, "convrot_groupsize": 64, "per_row": True}
        return {"weight": q.contiguous(), "weight_scale": s[:, None]}, unrotated, about
    if name.startswith("int8"):
        q, s = quantize_weight(weight)
        tensors = {"weight": q.contiguous(), "weight_scale": s[:, None]}
        return tensors, q.double() * s[:, None], INT8_FORMAT
    if name == "plain":
        q = weight.to(E4M3)
        return {"weight": q}, q.double(), None
    q, s = quantize_weight(weight, E4M3, "tensor")
    names = ("scale_weight", "scale_input") if name == "older" else ("weight_scale", "input_scale")
    tensors = {
        "weight": q.contiguous(),
        names[0]: s[0],
        **({} if name == "fp8 weights" else {names[1]: torch.tensor(0.03)}),
    }
    return tensors, q.double() * s, None if name == "older" else E4M3_FORMAT


#: name -> the class of a layer on a CPU, and on a GPU that multiplies fp8
KINDS = {
    "int8": ("Int8Linear", "Int8Linear"),
    "int8 beside": ("Int8Linear", "Int8Linear"),
    "int8 rotated": ("Int8Linear", "Int8Linear"),
    "fp8": ("W8A16Linear", "Fp8Linear"),
    "fp8 weights": ("W8A16Linear", "W8A16Linear"),
    "older": ("W8A16Linear", "Fp8Linear"),
    "plain": ("W8A16Linear", "W8A16Linear"),
}


def write(path, name, prefix="", change=lambda tensors, header: None):
    """The file, and what each layer's weight is."""
    tensors, weights, described = dit().state_dict(), {}, {}
    for layer in LAYERS:
        found, weights[layer], about = parts(tensors.pop(f"{layer}.weight"), name)
        tensors |= {f"{layer}.{n}": t for n, t in found.items()}
        if name == "int8 beside":
            tensors[f"{layer}.comfy_quant"] = torch.tensor([*json.dumps(about).encode()], dtype=torch.uint8)
        elif about is not None:
            described[prefix + layer] = about
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": described})} if described else {}
    tensors = {prefix + n: t.contiguous() for n, t in tensors.items()}
    change(tensors, header)
    save_file(tensors, path, metadata=header or None)
    return weights


@pytest.mark.every(2)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_formats(name, prefix, tmp_path):
    """Weights are those of the file to the last bit, and what is computed that of floats of these weights."""
    path = tmp_path / "model.safetensors"
    weights = write(path, name, prefix)
    floats = dit()
    for layer, w in weights.items():
        floats.get_submodule(layer).weight.copy_(w)
    with fp.interpret("sm_89"):
        on_gpu = fp.load_pretrained(path, model=dit())
    with torch.device("meta"):
        empty = Dit().eval()
    model = fp.load_pretrained(path, model=empty)
    for layer, w in weights.items():
        for loaded, cls in zip((model, on_gpu), KINDS[name]):
            found = loaded.get_submodule(layer)
            assert type(found).__name__ == cls
            torch.testing.assert_close(found.weight.double(), w, rtol=1e-6, atol=1e-7 if found.rotate else 0)
    y, expected = model(X), floats(X)
    assert (y - expected).norm() < (0.02 if name.startswith("int8") else 1e-5) * expected.norm()
    fp.save_pretrained(model, tmp_path / "ours")
    assert torch.equal(fp.load_pretrained(tmp_path / "ours", model=dit())(X), y)


CONVROT = {"convrot": True}
BROKEN = {
    "rotated by 16": (lambda t, h: h.update(_quantization_metadata=described(**CONVROT, convrot_groupsize=16)), "groups of 16"),
    "rotated by 256": (lambda t, h: h.update(_quantization_metadata=described(**CONVROT)), "128 inputs are no multiple"),
    "other format": (lambda t, h: h.update(_quantization_metadata=described(format="nvfp4")), "of the format 'nvfp4'"),
    "other dtype": (lambda t, h: h.update(_quantization_metadata=described(format="float8_e4m3fn")), "is torch.int8, and"),
    "no format": (lambda t, h: h.clear(), "does not say what its int8 weight is"),
    "no JSON": (lambda t, h: h.update(_quantization_metadata="{"), "names no layers"),
    "no layers": (lambda t, h: h.update(_quantization_metadata='{"layers": []}'), "names no layers"),
    "no scale": (lambda t, h: t.pop("proj.weight_scale"), "proj: its int8 weight has no scale"),
    "zero": (lambda t, h: t["proj.weight_scale"].zero_(), "proj: its weight_scale holds values"),
    "nan": (lambda t, h: t["proj.weight_scale"].fill_(torch.nan), "proj: its weight_scale holds values"),
    "shape": (lambda t, h: t.update({"proj.weight": torch.ones(8, 8).char(), "proj.weight_scale": SCALE}), "in the file, and"),
    "unknown": (lambda t, h: t.update({"proj.more": torch.ones(1)}), "'more', of which nothing"),
    "left over": (lambda t, h: t.update({"vae.weight": torch.ones(1)}), "'vae.weight' has no place"),
    "missing": (lambda t, h: t.pop("norm.weight"), "'norm.weight' is missing"),
    "beside": (lambda t, h: t.update({"proj.comfy_quant": torch.zeros(3, dtype=torch.uint8)}), "is no JSON object"),
    "long": (lambda t, h: t.update({"proj.comfy_quant": torch.zeros(9999, dtype=torch.uint8)}), "has 9999 bytes"),
}  # fmt: skip


def described(**entries):
    return json.dumps({"layers": {**dict.fromkeys(LAYERS, INT8_FORMAT), "proj": INT8_FORMAT | entries}})


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name, tmp_path):
    change, words = BROKEN[name]
    write(tmp_path / "x.safetensors", "int8", change=change)
    model = dit()
    before = objects(model)
    with pytest.raises(ValueError, match=words) as e:
        fp.load_pretrained(tmp_path / "x.safetensors", model=model)
    assert "\n" not in str(e.value)
    assert_same_objects(model, before)


def test_what_is_asked_for(tmp_path):
    path = tmp_path / "x.safetensors"
    write(path, "int8")
    with pytest.raises(ValueError, match="pass the model as model="):
        fp.load_pretrained(path)
    swapped = dit()
    fp.swap(swapped, "int8")
    with pytest.raises(ValueError, match="a model that is not swapped"):
        fp.load_pretrained(path, model=swapped)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        fp.load_pretrained(path, model=dit())


@pytest.mark.parametrize("name", ["int8", "int8 rotated", "fp8"])
@torch.inference_mode()
def test_written_back(name, tmp_path):
    """A file that is read and written has the same tensors, bit for bit, and says the same of its layers."""
    path, again = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    write(path, name)
    with fp.interpret("sm_89"):  # where e4m3 layers multiply in 8 bits
        model = fp.load_pretrained(path, model=dit())
    fp.export_pretrained(model, again, format="comfyui")
    files = [safe_open(p, "pt") for p in (path, again)]
    first, second = ({n: f.get_tensor(n) for n in f.keys()} for f in files)  # noqa: SIM118
    assert first.keys() == second.keys()
    assert all((first[n].dtype, first[n].shape) == (second[n].dtype, second[n].shape) for n in first)
    assert all(torch.equal(first[n].view(torch.uint8), second[n].view(torch.uint8)) for n in first if first[n].dim())
    said = [json.loads(f.metadata()["_quantization_metadata"])["layers"] for f in files]
    assert {n: {**x, "per_row": True} if name == "int8" else x for n, x in said[0].items()} == said[1]


@torch.inference_mode()
def test_written_and_read(tmp_path):
    fp.register_precision(PRECISION)
    model, x = dit(), tmp_path / "x.safetensors"
    fp.swap(model, "convrot")
    y = model(X)
    fp.export_pretrained(model, x, format="comfyui")
    assert torch.equal(fp.load_pretrained(x, model=dit())(X), y)
    with pytest.raises(ValueError, match="is there"):
        fp.export_pretrained(model, x, format="comfyui")
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        fp.export_pretrained(model, tmp_path, format="comfyui")
    rotated = dit()
    fp.swap(rotated, "int8_rotated")
    with pytest.raises(fp.Unsupported, match="groups of 128, and ComfyUI has 64 and 256"):
        fp.export_pretrained(rotated, tmp_path / "z.safetensors", format="comfyui")
    assert not (tmp_path / "z.safetensors").exists()


PRECISION = fp.Precision("convrot", 1, fp.nn.Int8Linear, {"symmetric": True, "rotate": 64})
