"""What a CPU user could generate text with, ours and its peers: built of one fp32 decoder."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import importlib
import importlib.metadata
import pathlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import forwardpass as fp
from benchmarks.peers import Missing, need
from forwardpass.cli import embedding
from forwardpass.cli.readout import NextTokens
from forwardpass.cli.source import Source
from forwardpass.common.models.decoding import Decoding, Generation, Run, run_of
from forwardpass.common.models.modules import tensor_bytes
from forwardpass.integrations.transformers.kv_scales import KV_CACHES
from forwardpass.proofs.walker import linear_like
from forwardpass.swap.plan import PlannedLayer
from forwardpass.swap.precision import find_precision

#: Behind a precision: a model in bfloat16; the head in w8a16; our cache (kv_cache="auto"), layer by layer; the layers as one
#: operation, with our cache; steps compiled.
MARKS = ("bf16", "head", "cache", "decoder", "compiled")


@dataclass(frozen=True)
class Subject:
    """What candidates are built of. kv_cache: of ours, passed on to `fp.swap`."""

    source: Source
    folder: pathlib.Path  #: for what others convert
    kv_cache: str | None = None

    @property
    def saved(self) -> pathlib.Path:
        """Where the model is once more, as save_pretrained writes it; not if it is one that is swapped already."""
        return self.folder / "model"

    @cached_property
    def loaded(self) -> tuple[nn.Module, Any]:
        """(model, tokenizer). Of a GGUF file to read what was saved takes a second in place of tens."""
        source = (
            dataclasses.replace(self.source, path=str(self.saved), gguf=None) if self.saved.exists() else self.source
        )
        return embedding.load(source, "cpu", NextTokens.auto)

    @property
    def model(self) -> nn.Module:
        return self.loaded[0]

    @property
    def tokenizer(self) -> Any:
        return self.loaded[1]


@dataclass(frozen=True)
class Candidate:
    """prepare: what a cell runs. losses: rows [n, length] -> of every token but the first its loss in nats; weight_bytes: that
    a step reads; cache_itemsize: of a value of the cache, bytes.
    """

    prepare: Callable[[Decoding], Run]
    losses: Callable[[Tensor], Tensor]
    weight_bytes: int
    cache_itemsize: float


def of_model(model: nn.Module, prepare: Callable[[Decoding], Run] | None = None, itemsize: float = 4) -> Candidate:
    """A decoder of transformers. Of its embedding a step reads a row, and all where the head is tied to it."""

    def losses(rows: Tensor) -> Tensor:
        logits = (model(input_ids=row[None]).logits[0, :-1].float() for row in rows)
        return torch.cat([F.cross_entropy(x, row[1:], reduction="none") for x, row in zip(logits, rows)])

    read = tensor_bytes(m for m in model.modules() if not isinstance(m, nn.Embedding))
    return Candidate(prepare or (lambda decoding: run_of(model)), losses, read, itemsize)


def eager_fp32(subject: Subject) -> Candidate:
    return of_model(subject.model)


def eager_bf16(subject: Subject) -> Candidate:
    return of_model(copy.deepcopy(subject.model).bfloat16(), itemsize=2)


def compiled(subject: Subject) -> Candidate:
    return of_model(subject.model, compiled_steps(subject.model))


def compiled_steps(model: Any) -> Callable[[Decoding], Run]:
    """torch.compile of a step, with a cache of one size, as transformers' generate has it with cache_implementation="static"."""
    cache_utils = importlib.import_module("transformers.cache_utils")
    # nothing of a model changes here, and it is the only one of its class in its process: guards on modules tell no more than
    # that, in 1.4 ms of a step of 11. Calls from C++ take another 0.5 of 7.5; without -O0 that code compiles for 100 s, not 30
    options = {
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        "cpp_wrapper": True,
        "aot_inductor.compile_wrapper_opt_level": "O0",
    }
    forward = torch.compile(model.forward, dynamic=False, options=options)

    def prepare(decoding: Decoding) -> Run:
        torch.compiler.reset()  # the code is for the sizes of a cell, and there is a limit to how much of it is kept
        cache = cache_utils.StaticCache(config=model.config, max_cache_len=decoding.length)

        def run(ids: Tensor, steps: int) -> list[float]:
            cache.reset()
            return Generation(model, ids, forward=forward, cache=cache).generate(steps)[1]

        return run

    return prepare


def ours(precision: str) -> Callable[[Subject], Candidate]:
    """A swapped copy. With "+head" behind the precision the head has a w8a16 copy of its own, though it is tied to the
    embedding."""

    def build(subject: Subject) -> Candidate:
        name, marks = parts_of(precision)
        model = copy.deepcopy(subject.model)
        if "bf16" in marks:
            model = model.bfloat16()
        options: dict[str, Any] = {} if subject.kv_cache is None else {"kv_cache": subject.kv_cache}
        if marks & {"cache", "decoder"}:
            options = {"kv_cache": "auto", **options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            plan = fp.swap(model, name, dry_run=True).plan
            if "head" in marks:
                plan = dataclasses.replace(plan, layers=(*plan.layers, head_layer(model)))
            report = fp.swap(model, plan=plan, decoder="decoder" in marks, **options)
        if "decoder" in marks and not report.decoder.stacks:
            raise Missing(f"its layers are no operation: {report.decoder.reason}")
        prepare = compiled_steps(model) if "compiled" in marks else None
        in_8_bits = KV_CACHES.get(subject.kv_cache or "auto") is not None
        return of_model(model, prepare, itemsize=1 if in_8_bits else model.dtype.itemsize)

    return build


def parts_of(precision: str) -> tuple[str, set[str]]:
    """The precision of the Linears, and the MARKS behind it."""
    parts, marks = precision.split("+"), set[str]()
    while len(parts) > 1 and parts[-1] in MARKS:
        marks.add(parts.pop())
    return "+".join(parts), marks


def head_layer(model: Any) -> PlannedLayer:
    module = model.get_output_embeddings()
    leaf = next(leaf for leaf in linear_like(model) if leaf.module is module)
    p = find_precision("w8a16")
    return PlannedLayer(leaf.fqn, leaf.in_features, leaf.out_features, leaf.has_bias, p.name, p.version, False)


def q8_0(subject: Subject) -> str:
    """GGUF in 8 bits, made by llama.cpp of the file that the other candidates are read from."""
    lib = need("llama_cpp", "llama-cpp-python")
    if subject.source.gguf is None:
        raise Missing("it reads GGUF files, and this model is none: pass smollm2")
    quantized = subject.folder / "q8_0.gguf"
    silent = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    settings = lib.llama_model_quantize_default_params()
    settings.allow_requantize, settings.ftype = True, lib.LLAMA_FTYPE_MOSTLY_Q8_0
    original = str(pathlib.Path(subject.source.path, subject.source.gguf)).encode()
    if not quantized.exists() and lib.llama_model_quantize(original, str(quantized).encode(), ctypes.byref(settings)):
        raise Missing("llama.cpp does not quantise the file")
    _silent.append(silent)
    return str(quantized)


_silent: list[Any] = []  #: what C holds pointers to


def llama_cpp(subject: Subject) -> Candidate:
    """Flash attention and cache as it chooses."""
    file = pathlib.Path(q8_0(subject))
    lib = importlib.import_module("llama_cpp")
    model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
    if not model:
        raise Missing("llama.cpp does not load its own Q8_0 file")
    return LlamaCpp(lib, model, subject.model.config.vocab_size).candidate(file.stat().st_size)


@dataclass
class LlamaCpp:
    """Its C interface, which takes several sequences at once."""

    lib: Any
    model: Any
    vocabulary: int
    context: Any = None

    BATCH = 2048  #: tokens of a call; it divides them by itself

    def candidate(self, file_bytes: int) -> Candidate:
        return Candidate(self.prepare, self.losses, file_bytes, 2)

    def start(self, sequences: int, length: int) -> None:
        """A cache for so many sequences, in place of the one before."""
        if self.context:
            self.lib.llama_free(self.context)
        settings = self.lib.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = sequences * -(-(length + 1) // 256) * 256, sequences
        settings.n_batch = self.BATCH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.no_perf = True
        self.context = self.lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {settings.n_ctx} tokens")

    def feed(self, rows: list[list[int]], begin: int, every: bool = False) -> Iterator[Tensor]:
        """Tokens of each sequence go in, from position `begin` on; logits [vocabulary] of the last of each come out, or of all."""
        entries = [
            (sequence, begin + i, token, every or i == len(row) - 1)
            for sequence, row in enumerate(rows)
            for i, token in enumerate(row)
        ]
        for start in range(0, len(entries), self.BATCH):
            part = entries[start : start + self.BATCH]
            batch = self.lib.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, (sequence, position, token, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
                batch.seq_id[i][0] = sequence
            failed = self.lib.llama_decode(self.context, batch)
            self.lib.llama_batch_free(batch)
            if failed:
                raise RuntimeError(f"llama_decode returned {failed}")
            for i, (*_, wanted) in enumerate(part):
                if wanted:
                    logits = self.lib.llama_get_logits_ith(self.context, i)
                    address = ctypes.addressof(logits.contents)
                    yield torch.frombuffer(
                        (ctypes.c_float * self.vocabulary).from_address(address), dtype=torch.float32
                    )

    def prepare(self, decoding: Decoding) -> Run:
        self.start(decoding.batch, decoding.length)

        def run(ids: Tensor, steps: int) -> list[float]:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
            rows, times = ids.tolist(), [time.perf_counter()]
            for step in range(steps + 1):
                rows = [[int(logits.argmax())] for logits in self.feed(rows, step and ids.shape[1] + step - 1)]
                times.append(time.perf_counter())
            return times

        return run

    def losses(self, rows: Tensor) -> Tensor:
        self.start(1, rows.shape[1])
        losses = []
        for row in rows:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
            for logits, target in zip(self.feed([row.tolist()], 0, every=True), row[1:]):
                losses.append(F.cross_entropy(logits, target))
        return torch.stack(losses)


def ctranslate2(subject: Subject) -> Candidate:
    """int8 by its own converter; sums and the cache in float32. It works on tokens as words."""
    ct2 = need("ctranslate2", "ctranslate2")
    converters = need("ctranslate2.converters", "ctranslate2")
    folder = subject.folder / "ctranslate2"
    if not folder.exists():
        converters.TransformersConverter(str(subject.saved)).convert(str(folder), quantization="int8")
    generator = ct2.Generator(str(folder), device="cpu", compute_type="int8", intra_threads=torch.get_num_threads())
    words_of = subject.tokenizer.convert_ids_to_tokens

    def prepare(decoding: Decoding) -> Run:
        def run(ids: Tensor, steps: int) -> list[float]:
            prompts = [words_of(row) for row in ids.tolist()]
            times = [time.perf_counter()]

            def note(result: Any) -> bool:
                if result.step == len(times) - 1:  # the first sequence of a step
                    times.append(time.perf_counter())
                return False

            length = {"max_length": steps + 1, "min_length": steps + 1}
            generator.generate_batch(prompts, **length, beam_size=1, include_prompt_in_result=False, callback=note)
            times.append(time.perf_counter())
            return [*times[: steps + 1], times[-1]]

        return run

    def losses(rows: Tensor) -> Tensor:
        scores = generator.score_batch([words_of(row) for row in rows.tolist()])
        return -torch.cat([torch.tensor(score.log_probs) for score in scores])

    return Candidate(prepare, losses, (folder / "model.bin").stat().st_size, 4)


def openvino(subject: Subject) -> Candidate:
    """OpenVINO GenAI on llama.cpp's Q8_0 file: continuous batching, without its cache of prefixes, which the rounds share."""
    genai, ov = need("openvino_genai", "openvino-genai"), need("openvino", "openvino")
    file = pathlib.Path(q8_0(subject))
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens = 4, 1 << 20  # GB; prompts go in at once
    scheduler.dynamic_split_fuse = scheduler.enable_prefix_caching = False
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    pipeline = genai.ContinuousBatchingPipeline(str(file), scheduler, "CPU", options)

    def begin(rows: Tensor, tokens: int, **settings: Any) -> list[Any]:
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.do_sample, config.ignore_eos, config.apply_chat_template = False, True, False
        for name, value in settings.items():
            setattr(config, name, value)
        return [pipeline.add_request(i, ov.Tensor(row[None].numpy()), config) for i, row in enumerate(rows)]

    def run(ids: Tensor, steps: int) -> list[float]:
        times, handles = [time.perf_counter()], begin(ids, steps + 1)
        while pipeline.has_non_finished_requests():
            pipeline.step()
            times.append(time.perf_counter())
        if len(times) != steps + 2 or any(len(h.read_all()[0].generated_ids) != steps + 1 for h in handles):
            raise RuntimeError(f"it took {len(times) - 1} calls for a prefill and {steps} steps")
        return times

    def losses(rows: Tensor) -> Tensor:
        parts = []
        for row in rows:
            (handle,) = begin(row[None], 1, echo=True, logprobs=1)
            while pipeline.has_non_finished_requests():
                pipeline.step()
            parts.append(-torch.tensor(handle.read_all()[0].generated_log_probs[1 : len(row)]))
        return torch.cat(parts)

    return Candidate(lambda decoding: run, losses, file.stat().st_size, 1)


PEERS: dict[str, Callable[[Subject], Candidate]] = {
    "eager fp32": eager_fp32,
    "eager bf16": eager_bf16,
    "compiled fp32": compiled,
    "llama.cpp Q8_0": llama_cpp,
    "ctranslate2 int8": ctranslate2,
    "openvino int8": openvino,
}
#: what else has a version to be told
PACKAGES = {"llama.cpp Q8_0": "llama-cpp-python", "ctranslate2 int8": "ctranslate2", "openvino int8": "openvino-genai"}


OURS = "forwardpass "  #: before a precision


def candidates(precisions: Iterable[str]) -> list[str]:
    """Ours in these precisions, and all peers. ValueError, in one sentence, on a precision that is none."""
    for precision in precisions:
        find_precision(parts_of(precision)[0])
    return [*(OURS + p for p in precisions), *PEERS]


def make(name: str, subject: Subject) -> Candidate:
    """Raises Missing where it cannot be had here."""
    return ours(name.removeprefix(OURS))(subject) if name.startswith(OURS) else PEERS[name](subject)


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(PACKAGES[name])
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return None


class Failed(Exception):
    """A candidate failed: how, as `failure` says it."""


def failure(e: Exception) -> str:
    """Whatever a candidate raises is its result; it is shown and the others go on."""
    if isinstance(e, Failed | Missing):
        return str(e)
    return f"failed: {type(e).__name__}: {' '.join(str(e).split())[:300]}"
