"""Calls of attention_8bit_with_lse by the names of its options, which an operation itself takes by position."""

from forwardpass import dispatch

DEFAULTS = {"causal": False, "softcap": 0.0, "batch_invariant": False}


def attention_8bit_arguments(q, k, v, rotates=True, dtype="int8", **options):
    """In the schema's order, up to the operands' scales."""
    names = dispatch.operations["attention_8bit"].parameters[5:16]
    assert options.keys() <= set(names)
    return q, k, v, dtype, rotates, *(options.get(n, DEFAULTS.get(n)) for n in names)
