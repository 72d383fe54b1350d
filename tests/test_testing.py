"""`pairwise`, on which the cases of every operation rest."""

import itertools

import pytest

from forwardpass.testing import compiled_for, pairwise

FACTORS = {
    "m": (1, 2, 16, 17, 64, 65, 200),
    "k": (1, 7, 64, 256),
    "dtype": ("half", "bfloat"),
    "weight": ("int8", "e4m3"),
    "gated": (True, False),
    "layout": tuple("abcd"),
}
#: compiled for three heights of a tile
KERNEL = {"m": lambda m: (m > 16) + (m > 64), "dtype": str, "weight": str, "gated": bool}


def kernels(rows):
    return {tuple(of(row[name]) for name, of in KERNEL.items()) for row in rows}


@pytest.mark.parametrize("asked", [(), compiled_for(KERNEL)], ids=["any", "few"])
def test_every_pair_occurs(asked):
    rows = pairwise(FACTORS, lambda row: (row.get("m"), row.get("k")) != (200, 256) or row.get("layout") != "d", asked)
    for a, b in itertools.combinations(FACTORS, 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(FACTORS[a], FACTORS[b]))
    assert all((row["m"], row["k"], row["layout"]) != (200, 256, "d") for row in rows)


def test_few_kernels_are_few():
    """Pairs of what a kernel is compiled for take 6: 3 heights, 2 types."""
    any_kernels, few = pairwise(FACTORS), pairwise(FACTORS, kernels=compiled_for(KERNEL))
    assert 6 <= len(kernels(few)) <= 9 < len(kernels(any_kernels)) and len(few) < 2 * len(any_kernels)
