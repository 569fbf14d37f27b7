"""Fused models under DistributedDataParallel: two processes over gloo, compared with the unfused model there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.networks import differing, states_differ
from nn import ddp_worker


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(ddp_worker.main, (str(folder),), nprocs=ddp_worker.WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ddp_worker.WORLD)]


@pytest.mark.parametrize("fuser", ["by name, kept", "by graph, kept"])
def test_training_is_the_unfused_models(fuser: str, ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        assert results[fuser]["losses"] == results["unfused"]["losses"], rank
        assert states_differ(results[fuser]["state"], results["unfused"]["state"]) == {}, rank
        assert differing(results[fuser]["absorbed"], results["unfused"]["absorbed"]) == 0, rank
    assert ranks[0][fuser]["losses"] != ranks[1][fuser]["losses"]  # they saw different data


@pytest.mark.parametrize("fuser", ["by name, kept", "by graph, kept", "by name, absorbed", "by graph, absorbed"])
def test_the_ranks_hold_the_same_weights(fuser: str, ranks: list[dict[str, Any]]) -> None:
    states = [
        {
            k: v for k, v in results[fuser]["state"].items() if "running" not in k
        }  # buffers are each rank's own between steps
        for results in ranks
    ]
    assert states_differ(*states) == {}
    assert all(torch.isfinite(torch.stack(results[fuser]["losses"])).all() for results in ranks)


@pytest.mark.parametrize("fuser", ["by name, kept", "by graph, kept", "by name, absorbed", "by graph, absorbed"])
def test_synchronized_norms(fuser: str, ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        error, output = results[fuser]["sync"]
        unfused_error, expected = results["unfused"]["sync"]
        assert "SyncBatchNorm expected input tensor to be on" in unfused_error
        assert error == ("" if "absorbed" in fuser else unfused_error)
        assert differing(output, expected) == 0
