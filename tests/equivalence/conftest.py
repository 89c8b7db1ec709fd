"""Reports that several tests read."""

import pytest

import moetk
from tests.equivalence.reported import T, hidden, layer


@pytest.fixture(scope="package")
def alike():
    return moetk.compare(layer(), layer(), hidden(T))


@pytest.fixture(scope="package")
def unnormalised():
    return moetk.compare(layer(), layer(renormalise=False), hidden(2, T))
