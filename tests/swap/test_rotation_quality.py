"""What rotation does to errors, as benchmarks.rotation measures it."""

import pytest

from forwardpass.cli import source

rotation = pytest.importorskip("benchmarks.rotation", reason="benchmarks are in the checkout only")
ROTATED = ("int8, rotated", "int8, rotated and calibrated")


@pytest.mark.every(3)
def test_a_hybrid_with_gated_delta_net():
    """Where outliers are planted, rotation loses less than half as much as one scale a row, and groups of 128 hardly less; no error
    grows along the recurrence."""
    pytest.importorskip("transformers")
    ways = ("int8", "int8, rotated", "int8, groups of 128")
    found = [*rotation.hybrids(256, [("linear_attention", 30.0)], ways)]
    plain, rotated, groups = (next(x for x in found if x["swapped"] == way) for way in ways)
    assert plain["relative_error"] > 2 * rotated["relative_error"]
    assert rotated["relative_error"] < 0.6 * groups["relative_error"]
    for x in found:
        assert 0.7 < x["last_quarter"] / x["first_quarter"] < 1.4, x


@pytest.mark.slow
def test_minilm_calibrated_and_rotated():
    try:
        source.find_model("minilm")
    except ValueError as e:
        pytest.skip(str(e))
    for found in rotation.of_model("minilm", [ROTATED[1]]):
        assert 0.9993 <= found["cosine_min"] < 1, found
