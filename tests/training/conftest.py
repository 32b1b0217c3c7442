"""Fixtures: one recording and one codec for every test that only reads them."""

import pytest
from training_data import make_codec, make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("training") / "data")


@pytest.fixture(scope="session")
def codec(data):
    return make_codec(data, data.parent / "codec")
