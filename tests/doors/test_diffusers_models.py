"""Models of diffusers: their Linears and their attention are swapped, and attention runs on ours within `fp.sdpa` too."""

import copy
import pickle

import pytest
import torch
from later import later
from rotation import paired
from small_models import assert_same_objects, objects

import forwardpass as fp
from forwardpass.dispatch.calls import Calls, counted

diffusers = later("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
_HEADS = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2}


def dit():
    model = diffusers.DiTTransformer2DModel(
        **_HEADS, in_channels=4, out_channels=8, sample_size=8, patch_size=2,
        num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 2]),
    }


def flux():
    model = diffusers.FluxTransformer2DModel(
        **_HEADS, num_single_layers=2, patch_size=1, in_channels=4, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 15, 4),
        "encoder_hidden_states": torch.randn(1, 7, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randn(15, 3),
        "txt_ids": torch.randn(7, 3),
    }


def sd3():
    model = diffusers.SD3Transformer2DModel(
        **_HEADS, sample_size=8, patch_size=2, in_channels=4, caption_projection_dim=64, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([1, 2]),
    }


def unet():
    """Cross attention with a mask, and GEGLU."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64, attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    return model, {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": torch.randn(2, 7, 64),
        "encoder_attention_mask": mask,
    }


#: model -> layers that are swapped, and calls of attention
MODELS = {dit: (19, 2), flux: (44, 4), sd3: (30, 2), unet: (50, 8)}


def built(make):
    torch.manual_seed(0)
    model, inputs = make()
    with torch.no_grad():
        for p in model.parameters():  # what starts as zero says nothing
            if not p.any():
                p.normal_(std=0.05)
    return model.eval(), inputs


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample


@pytest.mark.every(2)
@pytest.mark.parametrize(("make", "precision"), paired(MODELS, ["int8", "w8a16"]))
def test_swapped_and_restored(make, precision, tmp_path):
    model, inputs = built(make)
    before = run(model, inputs)
    report = fp.swap(model, precision)
    assert len(report.swapped) == MODELS[make][0]
    others = [s for s in report.skipped if s.bytes is None]  # convolutions wait for calibrate=
    attention = {s.reason.code: s.reason.fix for s in others if s.reason.code != "too_small"}
    assert attention == {"attention_on_cpu": "pass attention=True to swap it all the same"}
    during = run(model, inputs)
    assert (during - before).norm() < 0.01 * before.norm() and not torch.equal(during, before)
    with pytest.raises(RuntimeError, match=r"fp\.save_pretrained"):
        model.save_pretrained(tmp_path / "floats")
    fp.save_pretrained(model, tmp_path / "checkpoint")
    loaded = fp.load_pretrained(tmp_path / "checkpoint", model=built(make)[0])
    assert torch.equal(run(loaded, inputs), during)
    assert torch.equal(run(copy.deepcopy(model), inputs), during)
    fp.restore(model)
    assert torch.equal(run(model, inputs), before)


@pytest.mark.every(2)
@pytest.mark.parametrize("make", MODELS)
def test_in_bfloat16(make):
    model, inputs = built(make)
    model.to(torch.bfloat16)
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs.items()}
    before = run(model, inputs)
    fp.swap(model, "int8")
    assert model.dtype == torch.bfloat16
    during = run(model, inputs)
    assert during.dtype == torch.bfloat16
    assert (during.float() - before.float()).norm() < 0.03 * before.float().norm()
    fp.restore(model)
    assert torch.equal(run(model, inputs), before)


@pytest.mark.every(2)
@pytest.mark.parametrize("make", MODELS)
def test_attention_runs_on_ours_within_sdpa(make):
    model, inputs = built(make)
    before = run(model, inputs)
    with fp.sdpa() as calls:
        within = run(model, inputs)
    assert str(calls) == f"{MODELS[make][1]} x scaled_dot_product_attention: forwardpass"
    torch.testing.assert_close(within, before, rtol=0, atol=1e-5)
    fp.swap(model, "int8")
    during = run(model, inputs)
    with fp.sdpa():
        torch.testing.assert_close(run(model, inputs), during, rtol=0, atol=0.02 * float(during.abs().max()))


@pytest.mark.every(2)
@pytest.mark.parametrize("make", MODELS)
def test_attention_is_swapped(make, tmp_path):
    """As within `fp.sdpa`, in copies and in a checkpoint too, and put back."""
    model, inputs = built(make)
    before, forwards = run(model, inputs), {n: m.forward for n, m in model.named_modules()}
    report = fp.swap(model, "int8", attention=True)
    assert {s.before for s in report.attention} == {"sdpa"}
    assert not [s for s in report.skipped if "attention" in s.reason.code or "sdpa" in s.reason.code]
    with counted(Calls()) as calls:
        during = run(model, inputs)
    assert sum(calls.kernel_calls.values()) == MODELS[make][1] and not calls.fallbacks
    with fp.sdpa():
        assert torch.equal(run(model, inputs), during)
    assert torch.equal(run(copy.deepcopy(model), inputs), during)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), inputs), during)
    fp.save_pretrained(model, tmp_path / "checkpoint")
    loaded = fp.load_pretrained(tmp_path / "checkpoint", model=built(make)[0])
    with counted(Calls()) as calls:
        assert torch.equal(run(loaded, inputs), during)
    assert sum(calls.kernel_calls.values()) == MODELS[make][1]
    fp.restore(model)
    assert {n: m.forward for n, m in model.named_modules()} == forwards
    assert torch.equal(run(model, inputs), before)


@pytest.mark.every(2)
@pytest.mark.parametrize("make", MODELS)
def test_attention_in_8_bits(make):
    """Masks and cross attention too; what 8 bits lose is all that changes."""
    model, inputs = built(make)
    before = run(model, inputs)
    with fp.swap(model, attention="int8", crossover=0) as report, counted(Calls()) as calls:
        during = run(model, inputs)
    assert {s.bits for s in report.attention} == {"int8"} and not report.swapped
    assert sum(calls.kernel_calls.values()) == MODELS[make][1]
    assert all(name.endswith("Attention in int8") for name in calls.kernel_calls)
    with fp.sdpa("int8", crossover=0) as calls:
        assert torch.equal(run(model, inputs), during)
    assert str(calls) == f"{MODELS[make][1]} x scaled_dot_product_attention in int8: forwardpass"
    assert 0 < (during - before).norm() < 0.02 * before.norm()
    with fp.sdpa("int8") as calls:  # whose calls are short
        run(model, inputs)
    assert str(calls) == f"{MODELS[make][1]} x scaled_dot_product_attention: forwardpass"


#: model -> sums of gates and residuals that products compute, and norms with adaLN that quantise
ADAPTIVE = {dit: (4, 4), flux: (10, 10), sd3: (6, 7)}


@pytest.mark.every(2)
@pytest.mark.interpreted
@pytest.mark.parametrize("make", ADAPTIVE)
def test_adaln_on_kernels_of_a_gpu(make, monkeypatch):
    model, inputs = built(make)
    before, was = run(model, inputs), objects(model)
    report = fp.swap(model, "int8")
    sums = [m for m in model.modules() if getattr(m, "defers", False)]
    assert (len(sums), len(report.norms)) == ADAPTIVE[make]
    calls = []
    for layer in sums:
        monkeypatch.setattr(layer, "product", lambda *args, p=layer.product: calls.append(len(args)) or p(*args))
    with fp.interpret("sm_80"), monkeypatch.context() as m:
        m.setattr(fp.nn.DeferringNorm, "normed", lambda *_: pytest.fail("a norm was computed by itself"))
        during = run(model, inputs)
    assert calls == [3] * len(sums)
    assert (during - before).norm() < 0.02 * before.norm()
    fp.restore(model)
    assert_same_objects(model, was)


def test_attention_that_no_kernel_takes_runs_on_torch():
    model, inputs = built(flux)
    model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    before = run(model, inputs)
    with fp.sdpa() as calls:
        assert torch.equal(run(model, inputs), before)
    assert {reason.code: n for (_, reason), n in calls.fallbacks.items()} == {"dtype": 4}


def test_the_registry_of_backends_takes_no_other_name():
    """If that changes, forwardpass can be a backend."""
    with pytest.raises(ValueError, match="must be one of"):
        built(flux)[0].set_attention_backend("forwardpass")


def test_attention_that_is_fused_in_diffusers_way():
    model, inputs = built(sd3)
    before = run(model, inputs)
    fp.swap(model, "int8")
    during = run(model, inputs)
    with pytest.raises(RuntimeError, match=r"fuse_projections would take the 8-bit weights.*fuse first"):
        model.fuse_qkv_projections()
    assert torch.equal(run(model, inputs), during)
    fp.restore(model)
    model.fuse_qkv_projections()
    fused = run(model, inputs)
    torch.testing.assert_close(fused, before, rtol=0, atol=1e-5)
    report = fp.swap(model, "int8")
    assert any("to_qkv" in layer.fqn for layer in report.swapped)
    assert (run(model, inputs) - before).norm() < 0.01 * before.norm()
    fp.restore(model)
    assert torch.equal(run(model, inputs), fused)


def pipeline():
    model, _ = built(dit)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",)
    )
    pipe = diffusers.DiTPipeline(model, vae.eval(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.every(3)
def test_pictures_of_a_pipeline():
    pytest.importorskip("skimage", reason="the extra images is not installed")
    pipe = pipeline()

    def draw(model, labels):
        assert model is pipe.transformer
        return pipe(labels, num_inference_steps=3, generator=torch.Generator().manual_seed(3)).images  # PIL's

    before = objects(pipe.transformer)
    fp.swap(pipe.transformer, "int8")
    report = fp.parity(pipe.transformer, [[1, 2], [3]], images=draw)
    assert len(report.images.psnr) == 3 and not report.unreached
    assert 30 < min(report.images.psnr) < 80 and 0.9 < min(report.images.ssim) <= 1
    fp.restore(pipe.transformer)
    plan = fp.plan(
        pipe.transformer, [[1, 2]], images=draw, min_psnr=25, candidates="int8", exclude="**.emb.**", target="memory"
    )
    assert plan.layers and "lowest PSNR in dB >= 25" in str(plan)
    assert_same_objects(pipe.transformer, before)


def test_a_pipeline():
    pipe = pipeline()

    def image():
        generator = torch.Generator().manual_seed(3)
        return torch.from_numpy(pipe([1, 2], num_inference_steps=3, output_type="np", generator=generator).images)

    before = image()
    fp.swap(pipe.transformer, "int8")
    with fp.sdpa() as calls:
        during = image()
    assert calls.kernel_calls["scaled_dot_product_attention"] >= 6 and not calls.fallbacks
    assert (during - before).norm() < 0.05 * before.norm()
    fp.restore(pipe.transformer)
    assert torch.equal(image(), before)


@pytest.mark.every(2)
def test_adapters_of_a_pipeline():
    peft = pytest.importorskip("peft")
    model, inputs = built(flux)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "proj_out"], init_lora_weights=False)
    model.add_adapter(config)
    model.eval()
    before = run(model, inputs)
    report = fp.swap(model, "int8")
    assert "transformer_blocks.0.attn.to_q.base_layer" in {layer.fqn for layer in report.swapped}
    assert (run(model, inputs) - before).norm() < 0.01 * before.norm()
    with pytest.raises(RuntimeError, match="8-bit weights"):
        model.fuse_lora()
    with pytest.raises(ValueError, match="swapped already"):
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_k"]), adapter_name="late")
    fp.restore(model)
    assert torch.equal(run(model, inputs), before)
    model.fuse_lora()
