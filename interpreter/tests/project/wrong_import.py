"""A file of tests that launches a wrong kernel when it is imported."""

import outside_kernels

outside_kernels.wrong()


def test_nothing():
    pass
