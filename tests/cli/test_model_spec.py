"""What `package.module:callable` finds, and what it says when it finds nothing."""

import sys

import pytest
import torch
from torch import nn

from horizon_plugin_pytorch.cli.model_spec import SpecError, example_inputs, load_model, parse_shape

MODULE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

class Zoo:
    @staticmethod
    def small():
        return Net()

def build():
    return Net()

def sized(channels):
    return nn.Conv2d(3, channels, 1)

def number():
    return 3

instance = Net()
constant = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the modules `spec_nets` and `spec_lacking`; the latter imports what is not there."""
    (tmp_path / "spec_nets.py").write_text(MODULE)
    (tmp_path / "spec_lacking.py").write_text("import package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("spec_nets", "spec_lacking"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["Net", "build", "Zoo.small", "instance"])
def test_a_class_a_function_a_method_or_an_instance_is_a_model(folder, name):
    model = load_model(f"spec_nets:{name}")
    assert isinstance(model, nn.Module)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spec_nets", "'spec_nets' does not name a model: write package.module:callable"),
        ("spec_nets:", "does not name a model"),
        (":build", "does not name a model"),
        ("./spec_nets.py:build", "does not name a model"),
        ("spec_nothing:build", "there is no module 'spec_nothing'"),
        ("spec_nets.inner:build", "there is no module 'spec_nets.inner'"),
        ("spec_lacking:build", "spec_lacking imports package_that_is_not_there, which is not installed"),
        ("spec_nets:absent", "module 'spec_nets' has no 'absent'"),
        ("spec_nets:Zoo.large", "module 'spec_nets' has no 'Zoo.large'"),
        ("spec_nets:constant", "spec_nets:constant is a int, neither an nn.Module nor something that returns one"),
        ("spec_nets:number", "spec_nets:number() returned a int, not an nn.Module"),
        ("spec_nets:sized", "calling spec_nets:sized() raised TypeError"),
    ],
)
def test_what_is_not_a_model_is_named(folder, spec, message):
    with pytest.raises(SpecError) as caught:
        load_model(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "1,3,x", "1,,3", "1,3,0", "1,-3", "1.5"])
def test_a_shape_is_positive_integers(text):
    with pytest.raises(SpecError, match="is not a shape: write positive integers with commas"):
        parse_shape(text)


class Product(nn.Module):
    def forward(self, a, b):
        return a @ b


def test_example_inputs_have_the_shapes_and_are_the_same_every_time():
    first, second = (example_inputs(Product(), ["1,3,8,8", "8, 5"]) for _ in range(2))
    assert [tuple(t.shape) for t in first] == [(1, 3, 8, 8), (8, 5)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shapes", [["4,3", "4,3"], ["4,4"]])
def test_inputs_that_the_model_does_not_take_are_named(shapes):
    with pytest.raises(SpecError, match=f"does not run on inputs of shape {' and '.join(shapes)}: "):
        example_inputs(Product(), shapes)
