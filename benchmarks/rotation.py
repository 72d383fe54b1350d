"""What rotating inputs does to errors in 8 bits: layers with planted outliers, models, and a hybrid with GatedDeltaNet.

python -m benchmarks.rotation [--only layers embeddings perplexity hybrid] [--ways "int8, rotated"] [--json FILE]

`embeddings` and `perplexity` need the packaged models `minilm` and `smollm2`, and are measured as `forwardpass swap` measures them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardpass as fp
from benchmarks import bench
from forwardpass.cli import embedding
from forwardpass.cli.readout import readout_of
from forwardpass.cli.source import find_model
from forwardpass.common.models.compare import relative_error

#: name -> precision, and whether it is calibrated
WAYS = {
    "int8": ("int8", False),
    "int8, calibrated": ("int8", True),
    "int8, rotated": ("int8_rotated", False),
    "int8, rotated and calibrated": ("int8_rotated", True),
    "fp8": ("fp8", False),
}
WIDTH, ROWS = 1024, 256
GROUP = 128
#: kinds of three in four layers, and by what outliers are planted
HYBRIDS = (("linear_attention", 1.0), ("linear_attention", 30.0), ("full_attention", 30.0))


def planted(kind: str, rows: int, seed: int) -> Tensor:
    """Inputs [rows, WIDTH] as activations have them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=g)
    if kind == "log-normal channels":
        return x * (1.2 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))).exp()
    x[:, ::97] *= {"normal": 1, "each 97th channel x 30": 30, "each 97th channel x 300": 300}[kind]
    return x


@torch.no_grad()
def layers() -> Iterator[dict[str, Any]]:
    """Relative error of one layer's output, calibrated on other rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval()
    for kind in ("normal", "each 97th channel x 30", "each 97th channel x 300", "log-normal channels"):
        x, calibration = planted(kind, ROWS, 1), [planted(kind, 16 * ROWS, 2)]
        expected, row = model(x), {"inputs": kind}
        for name, (precision, calibrated) in WAYS.items():
            with fp.swap(model, precision, include="**", calibrate=calibration if calibrated else None):
                row[name] = relative_error(model(x), expected)
        yield row


def of_model(name: str, ways: list[str]) -> Iterator[dict[str, Any]]:
    """As `forwardpass swap` compares a model with itself, calibrated on the built-in texts."""
    source = find_model(name)
    readout = readout_of(source)
    model, tokenizer = embedding.load(source, "cpu", readout.auto)
    calibration, texts = readout.builtin()
    batches, others = (readout.tokenize(tokenizer, x, model, "cpu") for x in (texts, calibration))
    with torch.no_grad():
        expected = readout.results(model, batches)
    for way in ways:
        precision, calibrated = WAYS[way]
        with fp.swap(model, precision, calibrate=others if calibrated else None), torch.no_grad():
            yield {"model": name, "swapped": way, **readout.parity(readout.results(model, batches), expected)}


# ---- a hybrid


def hybrid(outliers: float, kind: str = "linear_attention") -> Any:
    """A Qwen3-Next of random weights: three layers of GatedDeltaNet (or of another kind), one of attention. Channels of what norms
    give, one in 97, are `outliers` times as large, and weights behind them as much smaller: in floats it computes the same."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3NextConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, linear_num_key_heads=8, linear_num_value_heads=16, linear_key_head_dim=64,
        linear_value_head_dim=64, mlp_only_layers=[0, 1, 2, 3], num_experts=4, max_position_embeddings=4096,
        layer_types=[kind, kind, kind, "full_attention"],
    )  # fmt: skip
    model = transformers.Qwen3NextForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            mixer = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
            for norm, readers in ((layer.input_layernorm, mixer), (layer.post_attention_layernorm, layer.mlp)):
                norm.weight[::97] = outliers * (1 + norm.weight[::97]) - 1
                for name, linear in readers.named_children():
                    if isinstance(linear, nn.Linear) and name not in ("out_proj", "o_proj", "down_proj"):
                        linear.weight.mul_(4)  # beyond the initial ones, at which gates hardly open
                        linear.weight[:, ::97] /= outliers
    return model


class InGroups(nn.Module):
    """A Linear of int8 weights and inputs, each 128 columns of a row with a scale of their own: what it would compute."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(self.rounded(linear.weight), False), linear.bias

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        q, scale, _ = fp.ops.quantize(x.detach(), torch.int8, group_size=GROUP)
        return q.float() * scale.repeat_interleave(GROUP, -1)[..., : x.shape[-1]]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.rounded(x), self.weight, self.bias)


def in_groups(model: Any) -> None:
    for fqn, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and fqn != "lm_head":
            model.set_submodule(fqn, InGroups(module))


def gates(model: Any) -> list[str]:
    """The projections of beta and of the decay, too small for a swap to take by default."""
    return [fqn for fqn, _ in model.named_modules() if fqn.endswith("in_proj_ba")]


@torch.no_grad()
def hybrids(
    tokens: int = 1024, models: Iterable[tuple[str, float]] = HYBRIDS, only: Container[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Relative error of the logits, of the first tokens and of the last, and KL of the next token's distribution; beside a model of
    attention alone. only: these ways."""
    g = torch.Generator().manual_seed(3)
    ids, others = (torch.randint(0, 512, (1, tokens), generator=g) for _ in range(2))
    calibration = [{"input_ids": others}]
    ways: dict[str, Callable[[Any], Any]] = {
        name: lambda m, p=p, c=c: fp.swap(m, p, calibrate=calibration if c else None, attention=False)
        for name, (p, c) in WAYS.items()
        if p != "fp8"
    }
    ways["int8, groups of 128"] = in_groups
    ways["int8, in_proj_ba too"] = lambda m: fp.swap(m, "int8", include=["**", *gates(m)], attention=False)
    ways["int8, rotated, in_proj_ba too"] = lambda m: fp.swap(
        m, "int8_rotated", include=["**", *gates(m)], exclude="lm_head", attention=False
    )
    for kind, outliers in models:
        floats = hybrid(outliers, kind)
        expected = floats(input_ids=ids).logits[0]
        for name, change in ways.items():
            if ("ba too" in name and not gates(floats)) or (only is not None and name not in only):
                continue
            model = copy.deepcopy(floats)
            with change(model) or nullcontext():
                actual = model(input_ids=ids).logits[0]
            quarters = [relative_error(a, b) for a, b in zip(actual.chunk(4), expected.chunk(4))]
            kl = F.kl_div(actual.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean")
            yield {"layers": kind, "outliers": outliers, "swapped": name, "relative_error": relative_error(actual, expected),
                   "first_quarter": quarters[0], "last_quarter": quarters[-1], "kl": kl.item()}  # fmt: skip


PARTS: dict[str, Callable[[list[str]], Iterator[dict[str, Any]]]] = {
    "layers": lambda ways: layers(),
    "embeddings": lambda ways: of_model("minilm", ways),
    "perplexity": lambda ways: of_model("smollm2", [name for name in ways if name != "fp8"]),
    "hybrid": lambda ways: hybrids(),
}


def main() -> None:
    p = bench.parser(__doc__)
    p.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS])
    p.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS], help="of models")
    args = p.parse_args()
    result = bench.header("rotation", "cpu", []) | {"threads": torch.get_num_threads()}
    for part in args.only:
        for row in PARTS[part](args.ways):
            result.setdefault(part, []).append(row)
            print(part, row, flush=True)
            bench.write(result, args.json)


if __name__ == "__main__":
    main()
