"""Training with a network in wrappers of torch: what works as without them, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from amed_engine import ConfigError, distill, fit
from amed_engine.adapters.fingerprint import fingerprint

DISTILL = {"nfe": 4, "total_kimg": 0.032, "batch": 8, "progress": False}
FIT = {"nfe": 3, "samples": 8, "batch": 8, "starts": 1, "early": 0, "late": 1, "progress": False}


@pytest.fixture(scope="module", autouse=True)
def group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("objective", ["greedy", "end_to_end"])
@pytest.mark.parametrize(
    "wrap", [nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel]
)
def test_a_wrapped_network_trains_the_same_predictor(tiny_model, wrap, objective):
    network = wrap(copy.deepcopy(tiny_model))
    got, expected = (distill(model, objective=objective, **DISTILL) for model in (network, tiny_model))
    # Copies change the order in which gradients are added up.
    torch.testing.assert_close(got.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-4)
    assert got.plan == expected.plan
    assert all(parameter.requires_grad for parameter in network.parameters())
    if isinstance(network, nn.parallel.DistributedDataParallel):
        assert network.require_backward_grad_sync  # as it was


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "shard",
    [
        lambda module: torch.distributed.fsdp.fully_shard(module),
        lambda module: torch.distributed.fsdp.FullyShardedDataParallel(module, device_id=torch.device("cpu")),
    ],
    ids=["fully_shard", "FSDP"],
)
def test_fsdp_is_refused_where_gradients_are_asked_for_alone(tiny_model, shard):
    network = shard(copy.deepcopy(tiny_model))
    with pytest.raises(ConfigError, match=r"under FSDP gives gradients by backward\(\) alone"):
        distill(network, **DISTILL)
    assert fit(network, **FIT).plan.model == fingerprint(tiny_model)
