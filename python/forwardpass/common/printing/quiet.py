"""What is said, and how often: other libraries' log, warnings that come once."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator

#: torchao and torch's pytree log four lines as transformers imports torchao, and transformers a table of the weights that a file
#: lacks, which who loads through us is told in a sentence.
LOGGERS = ("torchao", "torch.utils._pytree", "transformers")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it these libraries log errors alone. transformers sets its level as it is imported: import it first."""
    levels = [(logger, logger.level) for logger in map(logging.getLogger, LOGGERS)]
    for logger, level in levels:
        logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


@functools.cache
def warn_once(text: str) -> None:
    """A warning in a process, however often a model's code turns out to be another one."""
    warnings.warn(text, stacklevel=6)
