"""Engines of a network that can be stopped, with a real clock and with one that stands still."""

import time

import pytest
from engines import Clock, Network

from amed_engine import ContinuousSampler


@pytest.fixture
def network():
    return Network()


@pytest.fixture
def engine(network):
    with ContinuousSampler(network, rows=4, queue=16, verify=False) as made:
        yield made
        network.gate.set()


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made)
    return made


@pytest.fixture
def one_row(network, clock):
    """An engine of one row, whose ticks take a second by its own measure."""
    with ContinuousSampler(network, rows=1, queue=16, verify=False) as made:
        made._loop.pace.of = lambda size: 1.0
        yield made
        network.gate.set()
