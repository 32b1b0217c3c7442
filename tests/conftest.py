"""Fixtures: the tiny policy and the toy env."""

import os

import pytest
from tiny import ToyEnv, make_policy

os.environ.setdefault("MUJOCO_GL", "osmesa")


@pytest.fixture
def policy():
    return make_policy()


@pytest.fixture
def toy():
    return ToyEnv()
