"""The modes of treating batch norms, as the vendor documents them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from horizon_plugin_pytorch.qat_mode import QATMode, get_qat_mode, set_qat_mode
from horizon_plugin_pytorch.quantization import fuse_fx


@pytest.fixture(autouse=True)
def default_mode() -> Iterator[None]:
    yield
    set_qat_mode(QATMode.FuseBN)


def test_documented_values() -> None:
    assert {m.name: m.value for m in QATMode} == {
        "FuseBN": "fuse_bn",
        "WithBN": "with_bn",
        "WithBNReverseFold": "with_bn_reverse_fold",
    }
    assert get_qat_mode() is QATMode.FuseBN
    assert QATMode.WithBN == "with_bn"  # the vendor's are strings


@pytest.mark.parametrize("mode", list(QATMode))
def test_members_and_strings_are_accepted(mode: QATMode) -> None:
    for spelling in (mode, mode.value):
        set_qat_mode(spelling)
        assert get_qat_mode() is mode


@pytest.mark.parametrize("mode", ["WithBN", "with-bn", "", None, 1])
def test_others_are_not_and_change_nothing(mode: object) -> None:
    set_qat_mode("with_bn")
    with pytest.raises(
        ValueError, match=r"set_qat_mode: .* is not one of \['fuse_bn', 'with_bn', 'with_bn_reverse_fold'\]"
    ):
        set_qat_mode(mode)  # type: ignore[arg-type]
    assert get_qat_mode() is QATMode.WithBN


@pytest.mark.parametrize("mode", list(QATMode))
def test_what_fusing_by_graph_keeps(mode: QATMode) -> None:
    set_qat_mode(mode)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()).eval()
    fused = fuse_fx(model)
    kept = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(kept) == (mode is not QATMode.FuseBN)
    assert fused.fusion_report.groups[0].absorbed is (mode is QATMode.FuseBN)
    x = torch.randn(2, 2, 3, 3)
    assert torch.allclose(fused(x), model(x), atol=1e-6)


def test_reverse_fold_is_what_with_bn_is() -> None:
    """With one symmetric scale per channel there is nothing more to do."""
    models = []
    for mode in (QATMode.WithBN, QATMode.WithBNReverseFold):
        set_qat_mode(mode)
        torch.manual_seed(0)
        models.append(fuse_fx(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).train()))
    assert repr(models[0]) == repr(models[1])
    x = torch.randn(4, 2, 3, 3)
    outputs = [m(x) for m in models]
    assert torch.equal(*outputs)
