"""Fixtures of several files."""

import pytest


@pytest.fixture(params=[0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def seed(request):
    """Of a case's random data: one in `make test`, three in `make test-all`."""
    return request.param
