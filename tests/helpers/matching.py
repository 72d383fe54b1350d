"""Whether an operation's call is right, for tests that take any operation."""

import importlib

import torch


def cases_of(operation):
    """The module with its cases and its assert_matches."""
    return importlib.import_module(f"{operation.package}.cases")


def check(operation, args, call=lambda operation, args: operation(*args), **options):
    """What `call` returns; of an operation that writes into its arguments, all of the memory behind them."""
    cases = cases_of(operation)
    if operation.writes:
        got = cases.copied(args)
        expected = cases.copied(tuple(a.cpu() if isinstance(a, torch.Tensor) else a for a in args))
        call(operation, got)
        operation.runs["reference"](*expected)
        cases.assert_matches(got, expected)
        return
    got = call(operation, args)
    results = got if isinstance(got, tuple) else (got,)
    assert all(t.device == args[0].device for t in results if isinstance(t, torch.Tensor))
    cases.assert_matches(got, args, **options)
