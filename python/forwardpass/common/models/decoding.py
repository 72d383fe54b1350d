"""How a decoder generates: its prompts at once (prefill), then one step for each further token of every sequence (decode)."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..timing import Timing

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Decoding:
    """What a decoder is run for: `batch` prompts of `prompt` tokens each, then `steps` steps of `tokens` tokens for each of them:
    one, or more where a draft of several is verified at once. `fp.plan` takes it among its `shapes`.

    Raises:
        ValueError: a number is no whole one of 1 or more.
    """

    batch: int = 1
    prompt: int = 128
    steps: int = 32
    tokens: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} of a Decoding is a whole number of 1 or more, not {value!r}")

    @staticmethod
    def default_of(model: nn.Module) -> Decoding | None:
        """A chat's, as far as the model takes one; None where it is no decoder of transformers."""
        config = getattr(model, "config", None)
        most = getattr(config, "max_position_embeddings", None)
        if not isinstance(most, int) or not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
            return None
        return Decoding(1, max(1, min(128, most // 2)), max(1, min(32, most // 4)))

    @property
    def length(self) -> int:
        """The tokens of a sequence in the end."""
        return self.prompt + self.steps * self.tokens

    def produced(self, phase: str) -> int:
        """How many tokens a phase goes through."""
        return self.batch * (self.prompt if phase == "prefill" else self.steps * self.tokens)

    def prompts(self, model: nn.Module) -> Tensor:
        """int64 [batch, prompt]: any tokens, the same ones each time. ValueError where the model takes no sequences so long."""
        config = getattr(model, "config", None)
        vocabulary, most = getattr(config, "vocab_size", None), getattr(config, "max_position_embeddings", None)
        if vocabulary is None:
            raise ValueError(f"a Decoding takes a decoder of transformers, and a {type(model).__name__} has no config with a "
                             "vocab_size: pass batches")  # fmt: skip
        if most is not None and self.length > most:
            raise ValueError(
                f"{self} has sequences of {self.length} tokens, and the model takes {most}: shorten the prompt"
            )
        device = next(model.parameters()).device
        ids = torch.randint(vocabulary, (self.batch, self.prompt), generator=torch.Generator().manual_seed(0))
        return ids.to(device)

    def __str__(self) -> str:
        each = f" of {self.tokens} tokens" if self.tokens > 1 else ""
        return f"{self.batch} x {self.prompt} tokens, then {self.steps} steps{each}"


class Generation:
    """Sequences that a decoder of transformers continues greedily, in the cache that the model makes for itself.

    Args:
        ids: the prompts, int64 [batch, tokens]; mask: 0 where they are padded, on the left.
        forward: what steps call in place of the model, as what was compiled of it; cache: to be used in place of the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: Tensor | None = None,
        forward: Callable[..., Any] | None = None,
        cache: Any = None,
    ) -> None:
        self.model, self.forward, self.ids, self.cache = model, forward or model, ids, cache
        self.mask = None if mask is None or mask.all() else mask
        self._argument = cache_argument(model)
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def prefill(self) -> Tensor:
        """int64 [batch, 1]: the next token of each prompt."""
        return self._run(self.model, self.ids, self.mask)

    def step(self, ids: Tensor) -> Tensor:
        """The tokens [batch, n] go in, the next one [batch, 1] comes out."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(ids.shape)], 1)
        return self._run(self.forward, ids, self.mask)

    def _run(self, forward: Callable[..., Any], ids: Tensor, mask: Tensor | None) -> Tensor:
        kwargs: dict[str, Any] = self._last if self.cache is None else {self._argument: self.cache, **self._last}
        if mask is not None:
            kwargs = {"attention_mask": mask, **kwargs}
        result = forward(input_ids=ids, use_cache=True, **kwargs)
        self.cache = result[self._argument]
        logits: Tensor = result.logits
        return logits[:, -1:].argmax(-1)

    def generate(
        self, steps: int, tokens: int = 1, clock: Callable[[], float] = time.perf_counter
    ) -> tuple[Tensor, list[float]]:
        """(what was generated [batch, steps + 1], the time before the prefill, after it, and after each step)."""
        times = [clock()]
        generated = [self.prefill()]
        times.append(clock())
        for _ in range(steps):
            generated.append(self.step(generated[-1].expand(-1, tokens)))
            times.append(clock())
        return torch.cat(generated, 1), times


#: What transformers calls a cache, in arguments and in results, and called it before version 5.
CACHE_NAMES = ("cache", "past_key_values")


def cache_argument(model: nn.Module) -> str:
    """What a decoder's forward calls its cache."""
    new, old = CACHE_NAMES
    return new if new in inspect.signature(model.forward).parameters else old


def logits_by_steps(model: nn.Module, ids: Tensor, tokens: int = 8) -> Tensor:
    """Logits [batch, S, vocabulary] of ids [batch, S], read `tokens` at a time (8: the most of a step), so that each step
    sees the ones before it through the cache, in its dtype."""
    name, parts = cache_argument(model), []
    cache: dict[str, Any] = {}
    for part in ids.split(tokens, 1):
        result = model(input_ids=part, use_cache=True, **cache)
        cache = {name: result[name]}
        parts.append(result.logits)
    return torch.cat(parts, 1)


#: From prompts [batch, tokens] and how many steps: the times before the prefill, after it, and after each step.
Run = Callable[[Tensor, int], list[float]]


def clock_of(model: nn.Module) -> Callable[[], float]:
    """Seconds, when what the model was asked for is done."""

    def clock() -> float:
        if next(model.parameters()).device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def run_of(model: nn.Module) -> Run:
    """How a decoder of transformers generates."""
    clock = clock_of(model)
    return lambda ids, steps: Generation(model, ids).generate(steps, clock=clock)[1]


@torch.inference_mode()
def rates(
    runs: Mapping[str, Run],
    ids: Tensor,
    steps: int,
    rounds: int,
    warmup: int = 1,
    on_round: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Timing]]:
    """Tokens a second of each phase, candidate by candidate: medians and quartiles over the rounds, in which they take turns.

    A round of a candidate is one prefill and its steps, so the cache is the one that the prefill left.
    """
    samples: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in runs}
    for round in range(warmup + rounds):
        for name, run in runs.items():
            times = run(ids, steps)
            if round >= warmup:
                samples[name]["prefill"].append(ids.numel() / (times[1] - times[0]))
                samples[name]["decode"].append(len(ids) * steps / (times[-1] - times[1]))
        on_round()
    return {name: {phase: Timing.of(values) for phase, values in phases.items()} for name, phases in samples.items()}
