"""The fused modules under their public names."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from torch import Tensor, nn

import horizon_plugin_pytorch as horizon
from fusion.networks import ACTIVATIONS, ANCHORS, anchor_for, differing, make_norm, pattern_name, randomize
from horizon_plugin_pytorch.errors import FusionError
from horizon_plugin_pytorch.fusion import DOCUMENTED, grid
from horizon_plugin_pytorch.nn.intrinsic import FusedGroup, group_class

NAMES = [pattern.name for pattern in grid()]


def test_every_name_is_there() -> None:
    intrinsic = importlib.import_module("horizon_plugin_pytorch.nn.intrinsic")
    listed = dir(intrinsic)
    assert len(listed) == len(set(listed))
    for name in (
        *NAMES,
        *DOCUMENTED,
        "ConvBN2d",
        "ConvAddReLU2d",
        "ConvBNAddReLU62d",
        "ConvTransposeReLU2d",
        "LinearReLU",
    ):
        cls = getattr(intrinsic, name)
        assert issubclass(cls, FusedGroup) and cls.__name__ == cls.__qualname__ == name
        assert cls.__module__ == "horizon_plugin_pytorch.nn.intrinsic" and name in listed
        assert getattr(intrinsic, name) is cls is group_class(cls.pattern)


def test_they_import_by_name() -> None:
    from horizon_plugin_pytorch.nn.intrinsic import ConvBNAddReLU2d, LinearReLU

    assert ConvBNAddReLU2d is horizon.nn.intrinsic.ConvBNAddReLU2d
    assert LinearReLU.pattern.activation is not None and LinearReLU.pattern.activation.label == "ReLU"


@pytest.mark.parametrize("name", ["ConvBNRelu2d", "Convolution2d", "ConvBN4d", "ReLU", "__path2__"])
def test_other_names_are_not(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(horizon.nn.intrinsic, name)


@pytest.mark.parametrize("kind", ANCHORS)
def test_built_by_hand(kind: str) -> None:
    for norm in ("none", "BatchNorm"):
        for add in (False, True):
            for activation in ("none", "ReLU", "ReLU6"):
                anchor, x = anchor_for(kind)
                parts = [anchor, make_norm(norm, anchor), ACTIVATIONS[activation]()]
                modules = [randomize(m).double().eval() for m in parts if m is not None]
                if len(modules) == 1 and not add:
                    continue
                group = getattr(horizon.nn.intrinsic, pattern_name(kind, norm != "none", add, activation))(*modules)
                y = modules[0](x) if norm == "none" else modules[1](modules[0](x))
                other = torch.randn_like(y)
                expected = y + other if add else y
                expected = expected if activation == "none" else modules[-1](expected)
                actual = group(x, other) if add else group(x)
                assert differing(actual, expected, tolerance=0.0) == 0
                assert group.weight is anchor.weight and group.bias is anchor.bias and not group.training
                for copied in (copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
                    assert type(copied) is type(group)
                    assert differing(copied(x, other) if add else copied(x), expected, tolerance=0.0) == 0


def test_repr_tells_the_parts() -> None:
    text = repr(horizon.nn.intrinsic.ConvBNReLU2d(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()))
    assert (
        text.startswith("ConvBNReLU2d(")
        and "(conv): Conv2d(1, 2" in text
        and "(bn): " in text
        and "(relu): ReLU()" in text
    )


def test_wrong_parts_and_operands() -> None:
    with pytest.raises(TypeError, match=r"ConvBNReLU2d takes 3 modules \(conv, bn, relu\), not 2"):
        horizon.nn.intrinsic.ConvBNReLU2d(nn.Conv2d(1, 2, 3), nn.ReLU())
    group = horizon.nn.intrinsic.ConvAdd2d(nn.Conv2d(1, 1, 1))
    x = torch.randn(1, 1, 2, 2)
    with pytest.raises(TypeError, match="takes the anchor's input and the add's other operand"):
        group(x)
    with pytest.raises(FusionError, match="neither operand is the output of the Conv2d"):
        group.add(x, x)


def test_output_size_of_a_transposed_group() -> None:
    up, bn, relu = nn.ConvTranspose2d(1, 1, 3, 2), randomize(nn.BatchNorm2d(1)).eval(), nn.ReLU()
    x = torch.randn(1, 1, 3, 3)
    group = horizon.nn.intrinsic.ConvTransposeBNReLU2d(up, bn, relu).eval()
    expected = relu(bn(up(x, [8, 8])))
    for actual in (group(x, [8, 8]), group(x, output_size=[8, 8]), group(input=x, output_size=[8, 8])):
        assert differing(actual, expected, tolerance=0.0) == 0
    added = horizon.nn.intrinsic.ConvTransposeBNAdd2d(up, bn).eval()
    other = torch.randn(1, 1, 8, 8)
    assert differing(added(x, other, output_size=[8, 8]), bn(up(x, [8, 8])) + other, tolerance=0.0) == 0


def test_gradients_flow_to_everything() -> None:
    group = horizon.nn.intrinsic.LinearBNAddReLU(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()).train()
    x, other = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    out: Tensor = group(x, other)
    out.sum().backward()
    assert all(t.grad is not None for t in (x, other, *group.parameters()))
