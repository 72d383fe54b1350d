"""Modules that are made up from seeds: swapped, patched after the swap and restored, none is wrong in silence."""

import pytest
from judging import judge, table
from made_up_modules import cases
from rotation import number

#: How many run in each commit's tests, and in all.
FEW, MANY = 150, 6000


def run(first, count):
    verdicts = [(case, judge(case)) for case in cases(first, count)]
    print(table(verdicts))
    wrong = [f"{v.text}\n{case.text()}" for case, v in verdicts if v.outcome == "wrong"]
    assert not wrong, f"{len(wrong)} are wrong in silence. The first:\n{wrong[0]}"
    counts = {outcome: sum(v.outcome == outcome for _, v in verdicts) for outcome in ("right", "raised", "no module")}
    assert counts["raised"] < 0.1 * count and counts["no module"] < 0.1 * count
    assert counts["right"] > 0.5 * count and sum(v.rewritings > 0 for _, v in verdicts) > 0.3 * count


@pytest.mark.every(3)
def test_a_few_modules_that_are_made_up():
    """Other ones with each commit."""
    run(number() % MANY, FEW)


def test_a_module_that_was_calibrated_on_other_inputs():
    """A hook adds 1 to the input of an activation since: rounding made for other inputs has 4 times the error of the nearest."""
    (case,) = cases(7524, 1)
    assert judge(case).outcome == "right"


@pytest.mark.slow
def test_many_modules_that_are_made_up():
    run(0, MANY)
