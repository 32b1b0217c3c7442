"""Fixtures: the tiny policy, the toy env, and one recording and codec that tests only read."""

import os

import pytest
from tiny import ToyEnv, make_policy
from training_data import make_codec, make_data

os.environ.setdefault("MUJOCO_GL", "osmesa")


@pytest.fixture
def policy():
    return make_policy()


@pytest.fixture
def toy():
    return ToyEnv()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("training") / "data")


@pytest.fixture(scope="session")
def codec(data):
    return make_codec(data, data.parent / "codec")
