"""Measured BatchNorm statistics are the averages of the batches, and nothing else about the network changes."""

import torch
from torch import nn

from pipeline.model.batchnorm import BatchNorm2d, measure_statistics


def test_the_statistics_are_the_averages_of_the_batches() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3, momentum=0.1)).train()
    network(torch.full((4, 3, 2, 2), 100.0))  # what training left is forgotten
    batches = [torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert measure_statistics(network.eval(), iter(batches)) is network
    norm = network[0]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0))
    assert norm.momentum == 0.1
    assert not network.training


def test_a_network_without_batchnorm_reads_no_batches() -> None:
    network = nn.Sequential(nn.Linear(2, 2)).train()
    assert not measure_statistics(network, iter(())).training
    batches = iter([torch.zeros(1, 2)])
    measure_statistics(network, batches)
    assert len(list(batches)) == 1


def test_all_but_the_counter_is_pytorchs() -> None:
    """Also what it saves: a checkpoint is either's."""
    ours, theirs = BatchNorm2d(3), nn.BatchNorm2d(3)
    maps = torch.randn(3, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    for batch in maps:
        assert torch.equal(ours(batch), theirs(batch))
    assert [int(norm.state_dict()["num_batches_tracked"]) for norm in (ours, theirs)] == [0, 3]
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(maps[0]), theirs.eval()(maps[0]))
    measure_statistics(nn.Sequential(ours), iter(maps))
    assert ours.running_mean is not None
    torch.testing.assert_close(ours.running_mean, maps.mean((0, 1, 3, 4)))
