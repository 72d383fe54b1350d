"""Memory that the process has freed."""

from __future__ import annotations

import ctypes


def give_back_freed() -> None:
    """Has glibc give what was freed back to the system: it keeps holes below 32 MB, which larger blocks that come later do not fit
    into. Another allocator does as it likes."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
