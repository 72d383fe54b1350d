"""Which implementation of an operation runs, and why the others do not.

Every operation has the same ordered table: `cuda`, `triton`, `cpu`, `reference`. `auto` (the default) takes the first that
can run these arguments; a backend asked for by name that cannot raises `Unsupported` with its reason. Nothing falls back
without a trace: `explain` prints the table for a call, and FORWARDPASS_LOG=dispatch logs the choice once per new shape.
"""

from .choice import (
    BACKENDS,
    Interpreter,
    asked_for_by_name,
    choosing,
    current_choice,
    interpret_everywhere,
    interpreted_by,
    interpreter,
    use_backend,
)
from .devices import DEBUG, gpu_capability, gpu_takes, why_no_triton
from .operation import Explanation, Operation, explain, is_of_subclass, only_reference_on, operations
from .reason import Reason, Unsupported

__all__ = [
    "BACKENDS", "DEBUG", "Explanation", "Interpreter", "Operation", "Reason", "Unsupported", "asked_for_by_name", "choosing",
    "current_choice", "explain", "gpu_capability", "gpu_takes", "interpret_everywhere", "interpreted_by", "interpreter",
    "is_of_subclass", "only_reference_on", "operations", "use_backend", "why_no_triton",
]  # fmt: skip
