"""`forwardpass profile`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

import forwardpass as fp

from .. import embedding
from ..console import say, tracking
from ..options import Device, Json, Steps, SwappedName, number, prepare, refusing, write_json
from ..readout import Prompts, Request
from ..subject import find


def profile(
    model: SwappedName,
    text: Annotated[str | None, typer.Option(help="Texts to run, one a line; default: 288 built in.")] = None,
    batch: Annotated[int | None, number("Texts of a batch; default: 8, of a decoder 1.", least=1)] = None,
    length: Annotated[int, number("Tokens that each text is padded or cut to.", least=1)] = 128,
    steps: Steps = 32,
    batches: Annotated[int, number("Batches, one after the other.", least=1)] = 8,
    rounds: Annotated[int, number("Timed passes over the batches.", least=1)] = 3,
    device: Device = None,
    json: Json = None,
    html: Annotated[str | None, typer.Option(help="Also write a report with plots to this file.")] = None,
    trace: Annotated[str | None, typer.Option(help="Also write a Chrome trace to this file.")] = None,
) -> None:  # fmt: skip
    """Shows where the time of embedding, scoring or generating goes: tokenising, transfer, forward (of a decoder prefill
    and decode), output; then by layer.

    A folder of sentence-transformers says itself how texts are pooled and prompted, or that each is scored with the first."""
    console = Console(stderr=json == "-")
    where = prepare(device, json, html, trace, read=(model, text))
    with refusing(ValueError, OSError):
        texts = embedding.read_texts(text) if text else []
        source, loaded, tokenizer, readout = find(model, where, console, swaps=False)
        texts = texts or readout.builtin()[1]
        batch = batch or (1 if source.decoder else 8)
        if source.decoder:
            prompts = Prompts(loaded, tokenizer, length, steps)
            texts = prompts.pieces(texts)
            request: dict[str, Any] = {
                "preprocess": prompts.preprocess,
                "postprocess": prompts.postprocess,
                "steps": steps,
            }
        else:
            service = Request(loaded, tokenizer, length, readout)
            request = {"preprocess": service.preprocess, "forward": service.forward, "postprocess": service.postprocess}
    items = [[texts[(i * batch + j) % len(texts)] for j in range(batch)] for i in range(batches)]
    with tracking() as track, refusing(ValueError, TypeError, fp.Unsupported):
        profiled = fp.profile(
            loaded,
            items,
            **request,
            rounds=rounds,
            progress=track,
        )
    say(console, f"{readout.describe()}\n{profiled}")
    if html:
        profiled.save_html(html)
    if trace:
        profiled.save_trace(trace)
    if json:
        request_of = {"name": model, "origin": source.origin}
        about = {"model": request_of, "batch": batch, "length": length} | ({"steps": steps} if source.decoder else {})
        write_json(profiled.to_json() | about, json)
