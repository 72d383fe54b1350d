"""Guard mode: a kernel sees padded, poisoned copies of its arguments instead of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .storage import Scope, on_host

#: NaN in every floating dtype, -1 in every integer one
POISON = 0xFF
PADDING = 512
#: addresses stay what they were modulo this: what was misaligned still is
ALIGNMENT = 256


@dataclass
class _Region:
    """Tensors that share storage: copies of them in `buffer`, and the same in `expected`, which no kernel sees."""

    name: str
    originals: list[Tensor]
    buffer: Tensor
    copies: list[Tensor]
    expected: Tensor
    expected_views: list[Tensor]


class Guard:
    """Copies of tensors, their strides, their alignment and what they share kept; nothing else but poison around them."""

    def __init__(self, scope: Scope, read_only: bool):
        self._scope, self._read_only = scope, read_only
        self._regions: list[_Region] = []

    @torch.no_grad()
    def rehome(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        groups: dict[int, list[str]] = {}
        for name, t in tensors.items():
            if t.numel():
                groups.setdefault(t.untyped_storage().data_ptr(), []).append(name)
        rehomed = dict(tensors)
        for names in groups.values():
            region = self._region(", ".join(names), [on_host(tensors[n].detach()) for n in names])
            self._regions.append(region)
            rehomed.update(zip(names, region.copies))
        return rehomed

    def _region(self, name: str, originals: list[Tensor]) -> _Region:
        begin = min(t.data_ptr() for t in originals)
        size = max(t.data_ptr() + _span(t) for t in originals) - begin
        buffer = torch.full((size + 2 * PADDING + ALIGNMENT,), POISON, dtype=torch.uint8)
        start = PADDING + (begin - buffer.data_ptr() - PADDING) % ALIGNMENT

        def views(into: Tensor) -> list[Tensor]:
            return [_view(into, start + t.data_ptr() - begin, t) for t in originals]

        copies = views(buffer)
        for original, copy in zip(originals, copies):
            _distinct(copy).copy_(_distinct(original))
        expected = buffer.clone()
        self._scope.add(buffer.data_ptr() + start, size, name, self._read_only)
        return _Region(name, originals, buffer, copies, expected, views(expected))

    @torch.no_grad()
    def finish(self) -> str | None:
        """Copies results back. None, or a sentence on what was written where no element is."""
        for r in self._regions:
            if not self._read_only:
                for copy, expected, original in zip(r.copies, r.expected_views, r.originals):
                    _distinct(expected).copy_(_distinct(copy))
                    _distinct(original).copy_(_distinct(copy))
            changed = (r.buffer != r.expected).nonzero().flatten()
            if changed.numel():
                problem = "an input, which was changed" if self._read_only else "written outside of its elements"
                first = r.buffer.data_ptr() + int(changed[0]) - r.copies[0].data_ptr()
                return f"{r.name} is {problem}: {changed.numel()} bytes, the first {first} bytes from its first element"
        return None


def _span(t: Tensor) -> int:
    """Bytes from its first element to the end of its last one."""
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))) * t.element_size()


def _view(buffer: Tensor, offset: int, like: Tensor) -> Tensor:
    whole = torch.empty(0, dtype=like.dtype).set_(buffer.untyped_storage())
    return whole.as_strided(like.shape, like.stride(), offset // like.element_size())


def _distinct(t: Tensor) -> Tensor:
    """Each element once: an expanded dimension repeats them."""
    for d, stride in enumerate(t.stride()):
        t = t.narrow(d, 0, 1) if stride == 0 else t
    return t
