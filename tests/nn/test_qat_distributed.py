"""Training in two processes, and synchronized batch norms."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from horizon_plugin_pytorch.nn.qat import QATGroup
from horizon_plugin_pytorch.quantization import FakeQuantState, calibrate, set_fake_quantize
from nn.qat_networks import LSQ, QCONFIGS, Network, data, differing_after_convert, prepare, step

WORLD = 2
STEPS = 3


def train(model: nn.Module, share: slice) -> None:
    """Calibrate on, then train with, a share of each batch."""
    qat = model.module if isinstance(model, DistributedDataParallel) else model
    torch.manual_seed(3)
    calibrate(qat, [data(16)[share] for _ in range(2)], progress=False)
    set_fake_quantize(qat, FakeQuantState.QAT)
    qat.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for _ in range(STEPS):
        step(model, optimizer, data(16)[share])


def rank_main(rank: int, folder: Path, model: nn.Module) -> None:
    torch.set_num_threads(1)
    model = copy.deepcopy(model)  # what is passed to a process is in shared memory
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    x = torch.zeros(1, 3, 8, 8) + rank
    calibrate(model, [x], progress=False)  # so that the scales have their shapes, which DDP wants fixed
    train(DistributedDataParallel(model), slice(rank, None, WORLD))
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("qconfig", [QCONFIGS["min_max"], LSQ], ids=["min_max", "lsq"])
def test_two_ranks_train_as_one_on_the_whole_batch(qconfig: Any, tmp_path: Path) -> None:
    """Without norms, whose statistics are each rank's own: the same weights, ranges and scales on both, and as on one."""
    model = prepare(qconfig=qconfig, keep_bn=False)
    single = copy.deepcopy(model)
    torch.multiprocessing.spawn(rank_main, (tmp_path, model), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD))
    assert [k for k in first if not torch.equal(first[k], second[k])] == []
    train(single, slice(None))
    expected = single.state_dict()
    assert first.keys() == expected.keys()
    for key, tensor in expected.items():
        error, size = (first[key].double() - tensor.double()).norm(), tensor.double().norm()
        assert error <= 1e-3 * size, (key, error, size)


def test_synchronized_norms_inside_groups() -> None:
    """Built with them or converted later. (PyTorch synchronizes them on GPUs only; on the CPU they act as plain ones.)"""
    networks = [Network(nn.SyncBatchNorm), Network(), Network()]
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    x = data()
    synced, converted, plain = (prepare(network, x=x) for network in networks)
    models = [synced, nn.SyncBatchNorm.convert_sync_batchnorm(converted)]
    for model in [*models, plain]:
        torch.manual_seed(4)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(2):
            step(model, optimizer, data(8))
    expected = plain.state_dict()
    for model in models:
        norms = [g.norm for g in model.modules() if isinstance(g, QATGroup) and g.norm is not None]
        assert len(norms) == 4 and all(type(n) is nn.SyncBatchNorm for n in norms)
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert [k for k in state if not torch.equal(state[k], expected[k])] == []
        assert differing_after_convert(model, data()) == 0
        plain.load_state_dict(state)
        model.load_state_dict(expected)
