"""Ranks that live as long as a file of tests."""

import pytest

from tests.torch.gloo import Ranks


def _ranks(count, folder):
    ranks = Ranks(count, folder)
    yield ranks
    ranks.end()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    yield from _ranks(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    yield from _ranks(3, tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    yield from _ranks(4, tmp_path_factory.mktemp("four"))
