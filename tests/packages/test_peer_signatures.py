"""The pages in docs/migration speak of the arguments that these packages have."""

import pytest

from tests.docs.peer_signatures import SIGNATURES, installed, recorded

HERE = ("cut_cross_entropy", "liger_kernel", "trl")


@pytest.mark.parametrize("name", [name for name in SIGNATURES if name.startswith(HERE)])
def test_recorded_parameters_are_those_of_the_package(name):
    assert installed(name) == recorded(name)
