"""README.md of a checkpoint or an export: what was swapped, what was not and why, how large it is, and how to load it.

It has what the model and the report of its swap say, and no figure besides.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..common.files.json_files import write_text
from ..common.models.modules import tensor_bytes
from ..common.printing.text import count
from ..integrations.transformers import model_config
from ..nn import QuantizedModule
from ..swap import originals
from ..swap.report import Report, by_reason
from ..version import __version__
from .folder import is_hub_id

README = "README.md"
#: A README without this line is somebody's own.
_OURS = "<!-- Written by forwardpass, and replaced by its next save. Remove this line to keep it as it is. -->"


def write(folder: pathlib.Path, text: str) -> None:
    """Into the folder, where there is no README.md, or one that was written here."""
    path = folder / README
    if path.is_symlink() or not path.exists() or (path.is_file() and _OURS.encode() in path.read_bytes()):
        write_text(path, text)


def compose(
    model: nn.Module,
    layers: Mapping[str, QuantizedModule],
    stored_bytes: int,
    loading: str,
    code: str,
    *,
    library: str | None,
    tags: tuple[str, ...] = (),
) -> str:
    """The text of a model with these quantised layers.

    Args:
        stored_bytes: of all tensors in the files.
        loading, code: a sentence, and lines of Python that load it when they are run in the folder.
        library: that the hub takes it for.
    """
    prefix, report = _report(model)
    precisions = [*dict.fromkeys(_precision(layer) for layer in layers.values())]
    names = [*dict.fromkeys(name.partition(" ")[0] for name in precisions)]
    base = next((x for x in sorted(model_config.sources(model)) if is_hub_id(x)), None)
    title = type(model).__name__ + (f" of {base}" if base else "")
    lines = [
        "",
        _OURS,
        "",
        f"# {title} in {', '.join(names)}",
        "",
        loading,
        "",
        "```python",
        code,
        "```",
        "",
        "## What was swapped",
        "",
    ]
    before = {} if report is None else {f"{prefix}{x.fqn}": x.bytes_before for x in report.swapped}
    lines += ["| precision | layers | bytes |", "|---|---|---|"]
    for precision in precisions:
        members = {fqn: layer for fqn, layer in layers.items() if _precision(layer) == precision}
        now = f"{tensor_bytes(m for x in members.values() for m in x.modules()):,}"
        was = f"{sum(before[fqn] for fqn in members):,} -> " if members.keys() <= before.keys() else ""
        lines.append(f"| {precision} | {len(members)} | {was}{now} |")
    lines += ["", *_about(report, layers, stored_bytes)]
    if report is not None and report.skipped:
        lines += ["", "## What was left as it is", ""]
        skipped = [(f"{prefix}{s.fqn}", s.reason.code, str(s.reason)) for s in report.skipped]
        lines += [f"- {', '.join(f'`{name}`' for name in group)}: {reason}" for reason, group in by_reason(skipped)]
    return _with_metadata("\n".join([*lines, "", _versions(), ""]), library, base, ["forwardpass", *tags, *names])


def _with_metadata(text: str, library: str | None, base: str | None, tags: list[str]) -> str:
    """The text below what the hub reads of it, which huggingface_hub writes. Without that there is no hub, and the text alone."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return text.lstrip()
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(library_name=library, base_model=base, tags=tags)
    if base is not None:
        data["base_model_relation"] = "quantized"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}"))


def _report(model: nn.Module) -> tuple[str, Report | None]:
    """The report of the swap of a model, or of the part of it that was swapped, and what stands before its names."""
    for fqn, module in model.named_modules():
        if entry := originals.find(module):
            return (f"{fqn}." if fqn else ""), entry.report
    return "", None


def _precision(layer: QuantizedModule) -> str:
    name, version = vars(layer).get("precision"), vars(layer).get("precision_version")
    return type(layer).__name__ if name is None else f"{name} v{version}"


def _about(report: Report | None, layers: Mapping[str, QuantizedModule], stored_bytes: int) -> Iterator[str]:
    before = (
        ""
        if report is None
        else f" The model had {report.weight_bytes.before:,} bytes of parameters and buffers before."
    )
    yield f"The files hold {stored_bytes:,} bytes of tensors.{before}"
    if report is not None and report.plan.calibration:
        yield f"Layers are calibrated, on batches of the fingerprint {report.plan.calibration}."
    elif any(getattr(layer, "channel_scale", None) is not None for layer in layers.values()):
        yield "Layers are calibrated."
    elif report is not None:
        yield "Nothing is calibrated: weights are rounded to nearest."
    if report is not None and report.attention:
        computes = " and ".join(dict.fromkeys(s.bits for s in report.attention if s.bits))
        in_8_bits = f", in {computes}" if computes else ""
        yield f"Attention of {count(len(report.attention), 'module')} runs on the kernels of forwardpass{in_8_bits}."


def _versions() -> str:
    transformers = sys.modules.get("transformers")
    others = "" if transformers is None else f", transformers {transformers.__version__}"
    return f"Written by forwardpass {__version__}, torch {torch.__version__}{others}."
