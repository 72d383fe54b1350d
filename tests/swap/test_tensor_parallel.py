"""Models that transformers' tp_plan or torch's parallelize_module divides between two processes, before and after fp.swap."""

import copy
import itertools

import pytest
import ranks
import torch
from ranks import SIZE
from rotation import in_turn
from small_models import TwoLayers, assert_same_objects, codes, names, objects
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import forwardpass as fp

transformers = pytest.importorskip("transformers", minversion="5.20")

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100, "max_position_embeddings": 64}  # fmt: skip
IDS = torch.randint(3, 100, (2, 10), generator=torch.Generator().manual_seed(1))
ROW_WISE = ("o_proj", "down", "down_proj", "fc2")
PRECISIONS = ("int8", "w8a16", "fp8", "bf16")
STYLES = {"fc1": ColwiseParallel, "fc2": RowwiseParallel}


@pytest.fixture(scope="module")
def processes():
    pool = ranks.Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of float models, by name."""
    path = tmp_path_factory.mktemp("models")
    biased = {"attention_bias": True, "mlp_bias": True}
    models = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **biased)),
        "one_kv_head": transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 1})),
        "phi3": transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES, pad_token_id=0)),
        "mixtral": transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4)),
    }
    g = torch.Generator().manual_seed(3)
    for name, model in models.items():
        for parameter_name, p in model.named_parameters():
            if parameter_name.endswith("bias"):  # which are zeros
                p.data.normal_(std=0.1, generator=g)
        model.save_pretrained(path / name)
    return path


def one_process(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def divided(folder, **options):
    return one_process(folder, tp_plan="auto", tp_size=SIZE, **options)


@torch.inference_mode()
def logits(model):
    return model(IDS).logits


class Slices(nn.Module):
    """A row-wise layer in one process: the sum of what its slices give."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return ranks.slices(self.layer, x)[0].to(x.dtype)


def by_slices(model):
    """A swapped model of one process, whose row-wise layers round inputs slice by slice, as ranks do."""
    for name, module in list(model.named_modules()):
        if isinstance(module, fp.nn.QuantizedLinear) and name.rpartition(".")[2] in ROW_WISE:
            model.set_submodule(name, Slices(module))
    return model


def error(y, expected):
    return ((y - expected).norm() / expected.norm()).item()


def check_halves(part, whole):
    """Every quantised weight is divided: what a process has of them is half, to the byte."""
    assert 2 * ranks.weight_bytes(part) == ranks.weight_bytes(whole) > 0


#: Of the logits, relative: sums in another order, and of int8 and fp8 a few inputs that so lie on the other side of a rounding, one
#: step of a value in hundreds; bfloat16 rounds each rank's sum. What one process rounds is 5e-3 (int8, w8a16), 2e-2 (fp8).
KERNELS = {"w8a16": 2e-6, "int8": 5e-4, "fp8": 4e-3, "bf16": 4e-3}


def swapped_after(folder, precision):
    one, model = one_process(folder), divided(folder)
    as_floats, before = logits(model), objects(model)
    torch.testing.assert_close(as_floats, logits(one), rtol=1e-4, atol=1e-5)
    tried = fp.swap(model, precision, dry_run=True)
    report = fp.swap(model, precision, strict=True)
    whole = fp.swap(one, precision)
    assert names(report) == names(whole) and report.mlps == whole.mlps != [] and report.joined == whole.joined
    floats = sum(
        local(p).untyped_storage().nbytes() for p in model.parameters()
    )  # views, as transformers reads them on a CPU
    assert tried.weight_bytes == report.weight_bytes
    assert report.weight_bytes.after - floats < 0.55 * (whole.weight_bytes.after - floats)  # with scales and biases
    check_halves(model, one)
    assert isinstance(model.model.layers[0].mlp, fp.nn.GatedMLP)
    y, expected = logits(model), logits(one)
    assert error(y, logits(by_slices(one))) < KERNELS[precision]
    if precision in ("w8a16", "bf16"):
        assert error(y, expected) < KERNELS[precision]
    floats = logits(one_process(folder))
    assert error(y, floats) < 1.1 * error(expected, floats)  # finer scales of row-wise inputs
    parity = fp.parity(model, [{"input_ids": IDS}])
    assert parity.output.relative_error == pytest.approx(error(y, floats), rel=0.05)
    assert all(layer.total.samples and layer.kernel.relative_error < KERNELS[precision] for layer in parity.layers)
    fp.restore(model)
    assert torch.equal(logits(model), as_floats)
    after = objects(model)
    assert after[0] == before[0]
    assert all(
        x[:3] == before[1][n][:3] and torch.equal(local(x[3]), local(before[1][n][3])) for n, x in after[1].items()
    )


def local(t):
    return t.to_local() if isinstance(t, DTensor) else t


@pytest.mark.every(3)
@pytest.mark.parametrize("precision", in_turn(PRECISIONS))
def test_a_model_that_transformers_divides_is_swapped(processes, folders, precision):
    processes.run(swapped_after, folders / "llama", precision)


def loaded(folder, floats):
    """A checkpoint, divided by transformers as it is loaded."""
    one, model = fp.load_pretrained(folder), divided(folder)
    check_halves(model, one)
    assert isinstance(model.model.layers[0].mlp, fp.nn.GatedMLP) == isinstance(one.model.layers[0].mlp, fp.nn.GatedMLP)
    y = logits(model)
    assert error(y, logits(by_slices(one))) < KERNELS["int8"]
    assert error(y, floats) < 1.5 * error(logits(fp.load_pretrained(folder)), floats)
    ranks.refused(
        lambda: fp.save_pretrained(model, folder / "again"), ValueError, "takes whole layers, and model.layers.0."
    )
    assert not (folder / "again").exists()


@pytest.mark.every(2)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_checkpoint_is_divided_as_it_is_loaded(processes, folders, tmp_path, calibrated):
    model = one_process(folders / "llama")
    floats = logits(model)
    fp.swap(model, "int8", calibrate=[IDS] * 8 if calibrated else None)
    fp.save_pretrained(model, tmp_path / "int8")
    processes.run(loaded, tmp_path / "int8", floats)


def generates(folder, options):
    model, one = divided(folder), one_process(folder)
    for m in (model, one):
        fp.swap(m, "w8a16", **options)
    tokens = [m.generate(IDS, max_new_tokens=6, do_sample=False) for m in (model, one)]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("options", in_turn([{}, {"attention": True}, {"kv_cache": "auto"}, {"kv_cache": "int8"}]))
def test_attention_and_caches_are_of_a_rank_s_heads(processes, folders, options):
    processes.run(generates, folders / "llama", options)


def packed(folder):
    """phi3's gate and up: gathered by transformers' plan, and by another one the two halves are divided each by itself."""
    mlp = "model.layers.*.mlp."
    packs = {f"{mlp}gate_up_proj": "packed_colwise", f"{mlp}down_proj": "rowwise"}
    for plan, is_one_module in (("auto", False), (packs, True)):
        model = one_process(folder, tp_plan=plan, tp_size=SIZE)
        one = one_process(folder)
        assert error(logits(model), logits(one)) < 1e-6
        reports = [fp.swap(m, "w8a16") for m in (model, one)]
        assert names(reports[0]) == names(reports[1])
        assert isinstance(model.model.layers[0].mlp, fp.nn.GatedMLP) == is_one_module
        assert error(logits(model), logits(one)) < KERNELS["w8a16"]


def test_gate_and_up_of_one_layer(processes, folders):
    processes.run(packed, folders / "phi3")


def experts(folder):
    """Experts stay, as the report says, and the rest is swapped."""
    model = divided(folder)
    floats = logits(model)
    report = fp.swap(model, "w8a16")
    assert codes(report)["model.layers.0.mlp.experts"] in ("tensor_class", "hooks")
    assert error(logits(model), floats) < 2e-2 and len(names(report)) == 8


def experts_of_a_checkpoint(folder):
    ranks.refused(lambda: divided(folder), ValueError, "mlp.experts is a quantised Experts, which transformers'")


def test_experts_stay(processes, folders, tmp_path):
    processes.run(experts, folders / "mixtral")
    model = one_process(folders / "mixtral")
    fp.swap(model, "w8a16")
    fp.save_pretrained(model, tmp_path / "w8a16")
    processes.run(experts_of_a_checkpoint, tmp_path / "w8a16")


def one_kv_head(folder):
    """What transformers says of it comes before anything of ours."""
    model = divided(folder)
    ranks.refused(lambda: logits(model), Exception, "")
    fp.swap(model, "w8a16")
    ranks.refused(lambda: logits(model), Exception, "")


def test_heads_that_cannot_be_divided_fail_as_in_transformers(processes, folders):
    processes.run(one_kv_head, folders / "one_kv_head")


# ---- plain modules


def two_layers():
    torch.manual_seed(0)
    return TwoLayers().eval()


def plain(precision, order):
    """torch's styles, then a swap; or a swap, then ours."""
    one, model, mesh = two_layers(), two_layers(), ranks.mesh()
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    x[..., 7] *= 30
    floats = one(x)
    if order == "divided first":
        parallelize_module(model, mesh, {name: style() for name, style in STYLES.items()})
        divided_floats, before = model(x), objects(model)
    report = fp.swap(model, precision)
    if order == "swapped first":
        parallelize_module(model, mesh, {"fc1": fp.nn.ColwiseParallel(), "fc2": fp.nn.RowwiseParallel()})
    assert names(report) == names(fp.swap(one, precision)) == ["fc1", "fc2"]
    assert [s.activation for s in report.swapped] == ["gelu", None]
    check_halves(model, one)
    with torch.inference_mode():
        y, expected, sliced = model(x), one(x), by_slices(one)(x)
        empty = model(x[:0])
    assert empty.shape == (0, 5, 64)
    assert error(y, sliced) < KERNELS[precision] and error(y, floats) < 1.2 * error(expected, floats)
    if order == "divided first":
        parity = fp.parity(model, [x])
        assert parity.output.relative_error == pytest.approx(error(y, divided_floats), rel=0.05)
        # no kernel between the two: w8a16 and int8 sum exactly or in float32, bf16 rounds a rank's sum
        assert all(layer.kernel.relative_error < (1e-5 if precision != "bf16" else 4e-3) for layer in parity.layers)
        fp.restore(model)
        assert torch.equal(model(x), divided_floats)
        assert objects(model)[0] == before[0]


@pytest.mark.parametrize(
    ("precision", "order"), in_turn(itertools.product(PRECISIONS, ["divided first", "swapped first"]), 4)
)
def test_plain_modules(processes, precision, order):
    processes.run(plain, precision, order)


class Behind(nn.Module):
    """An activation behind a layer that is row-wise."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)

    def forward(self, x):
        return self.second(self.act(self.first(x)))


def activation_behind_sums():
    torch.manual_seed(0)
    model, mesh = Behind().eval(), ranks.mesh()
    x = torch.randn(4, 64)
    one = copy.deepcopy(model)
    assert fp.swap(one, "w8a16").swapped[0].activation == "gelu"
    ranks.refused(lambda: parallelize_module(one, mesh, {"first": fp.nn.RowwiseParallel(input_layouts=Replicate())}),
                  ValueError, "sums over processes, and it computes gelu")  # fmt: skip
    expected = one(x)
    parallelize_module(model, mesh, {"first": RowwiseParallel(input_layouts=Replicate()), "second": ColwiseParallel()})
    report = fp.swap(model, "w8a16")
    assert report.swapped[0].activation is None and isinstance(model.act, nn.GELU)
    torch.testing.assert_close(model(x), expected.chunk(2, -1)[mesh.get_local_rank()], rtol=1e-5, atol=1e-5)


class Qkv(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 96), nn.Linear(64, 64), nn.Linear(64, 80)

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def joined():
    """q, k and v as one product are divided each by itself, before and after, called or not."""
    torch.manual_seed(0)
    model, mesh = Qkv().eval(), ranks.mesh()
    x, rank = torch.randn(4, 64), mesh.get_local_rank()
    one = copy.deepcopy(model)
    fp.swap(one, "int8")
    parts = [y.chunk(2, -1)[rank] for y in one(x).split([96, 64, 80], -1)]
    expected = torch.cat(parts, -1)
    for style, called in ((ColwiseParallel, False), (fp.nn.ColwiseParallel, False), (fp.nn.ColwiseParallel, True)):
        m = copy.deepcopy(model)
        if style is ColwiseParallel:
            parallelize_module(m, mesh, {"?": style()})
        report = fp.swap(m, "int8")
        assert report.joined == [("q", "k", "v")]
        if called:
            m(x)
        if style is not ColwiseParallel:
            parallelize_module(m, mesh, {"?": style()})
        for _ in range(2):
            assert torch.equal(m(x), expected)
        assert m.q.joined.layer.qweight.shape == (120, 64)
        assert m.q.qweight.untyped_storage()._cdata == m.v.qweight.untyped_storage()._cdata


def swapped_with_gate_and_up(folder):
    """A GatedMLP is divided by its two layers' names."""
    one, mesh = one_process(folder), ranks.mesh()
    fp.swap(one, "int8")
    model = copy.deepcopy(one)
    column, row = fp.nn.ColwiseParallel(), fp.nn.RowwiseParallel()
    parallelize_module(model, mesh, {"model.layers.*.mlp.gate_up": column, "model.layers.*.mlp.down_proj": row})
    mlp = model.model.layers[0].mlp
    assert mlp.gate_up.qweight.shape == (128, 64) and mlp.down_proj.qweight.shape == (64, 64)
    assert error(logits(model), logits(one)) < 5e-3
    assert mlp.separate()["up_proj"].qweight.shape == (64, 64)


def refusals(folder):
    model, mesh = two_layers(), ranks.mesh()
    x = torch.randn(4, 64)
    parallelize_module(model, mesh, {name: style() for name, style in STYLES.items()})
    before = model(x)
    ranks.refused(lambda: fp.swap(model, "int8", calibrate=[x]), ValueError, "calibration takes whole layers, and fc1")
    ranks.refused(lambda: fp.swap(model, "int8", keep="cpu"), ValueError, 'pass keep="device", or keep=False')
    ranks.refused(lambda: fp.plan(model, [x], max_error=0.1), ValueError, "plan takes whole layers, and fc1")
    with torch.inference_mode():
        ranks.refused(
            lambda: fp.swap(model, "int8"), ValueError, "and fc1 is divided between processes: call it outside"
        )
    fp.swap(model, plan=fp.swap(two_layers(), "int8", dry_run=True).plan, keep="device")
    ranks.refused(lambda: fp.save_pretrained(model, "nowhere"), ValueError, "store the model before it is divided")
    fp.restore(model)
    fp.register_precision(fp.Precision("fp8_block", 1, fp.nn.Fp8Linear, {"scales": "block"}))
    ranks.refused(lambda: fp.swap(model, "fp8_block"), ValueError, "parts of 64 are no multiple of 128")
    assert torch.equal(model(x), before)
    with torch.no_grad():
        local(model.fc2.weight)[3, 5] = torch.nan if mesh.get_local_rank() else 1.0  # all ranks must decide the same
    report = fp.swap(model, "int8")
    assert codes(report)["fc2"] == "not_finite" and names(report) == ["fc1"]
    swapped = divided(folder)
    fp.swap(swapped, "int8")
    ranks.refused(lambda: fp.export_pretrained(swapped, "nowhere"), ValueError, "takes whole layers")


def others_are_left_alone():
    """Hooks of one's own, styles that are not known, FSDP."""
    mesh = ranks.mesh()

    class Own(ColwiseParallel):
        @staticmethod
        def _prepare_input_fn(input_layouts, desired, module, inputs, mesh):
            return ColwiseParallel._prepare_input_fn(input_layouts, desired, module, inputs, mesh)

    model = two_layers()
    parallelize_module(model, mesh, {"fc1": Own(), "fc2": RowwiseParallel()})
    model.fc2.register_forward_hook(lambda *_: None)
    assert {*codes(fp.swap(model, "int8")).values()} <= {"tensor_class", "hooks"}
    model = fully_shard(nn.Sequential(nn.Linear(64, 64)), mesh=mesh)
    report = fp.swap(model, "int8")
    assert codes(report) == {"0": "tensor_class"}


@pytest.mark.parametrize("function", [activation_behind_sums, joined, others_are_left_alone])
def test_modules(processes, function):
    processes.run(function)


@pytest.mark.every(3)
@pytest.mark.parametrize("function", [swapped_with_gate_and_up, refusals])
def test_llama(processes, folders, function):
    processes.run(function, folders / "llama")


@pytest.mark.every(3)
def test_nothing_is_divided_where_nothing_is():
    model = two_layers()
    before = objects(model)
    fp.swap(model, "int8")
    assert model.fc2.sharding is None
    fp.restore(model)
    assert_same_objects(model, before)
