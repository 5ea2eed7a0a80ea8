"""A small sampler, and how workers make it."""

import functools

import pytest

from amed_engine import Sampler


@pytest.fixture(scope="session")
def sampler():
    return Sampler("digits", nfe=3)


@pytest.fixture(scope="session")
def making():
    """A function that can be handed to workers, as the command line has one."""
    return functools.partial(Sampler, "digits", nfe=3)
