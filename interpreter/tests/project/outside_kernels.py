"""Kernels with findings that a library launches by itself, through the driver: in every place of a test, and outside of tests."""

import contextlib
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "fronts"))
import driver_script


def wrong():
    with contextlib.suppress(AssertionError):
        driver_script.main("load", "past")


@pytest.fixture(scope="module")
def made_wrongly():
    wrong()


@pytest.fixture
def ended_wrongly():
    yield
    wrong()


@pytest.fixture
def failing():
    wrong()
    raise AssertionError("of the fixture")


def test_right():
    driver_script.main("load")


def test_call():
    wrong()


def test_setup(made_wrongly):
    pass


def test_after_it(made_wrongly):
    pass


def test_teardown(ended_wrongly):
    pass


def test_after_teardown():
    pass


def test_failing_setup(failing):
    pass
