"""What a command line says about a model: ``package.module:callable`` or an ONNX file, and the shapes of its inputs."""

from __future__ import annotations

import importlib
import os
import sys
from operator import attrgetter

import torch
from torch import nn


class SpecError(ValueError):
    """A model or an input that the command line names wrongly; the message says what to write instead."""


def load_model(spec: str) -> nn.Module:
    """Build the model that ``spec`` names.

    Args:
        spec: the path of an ``.onnx`` file, or ``package.module:name``. ``name`` is an ``nn.Module``, or a class or function that returns one when called
            without arguments; dots reach into it (``package.module:Factory.build``). The current folder is searched
            as well as the installed packages, as ``python -m`` does.

    Raises:
        SpecError: nothing is found there, or it is not a model. What the model's own code raises while it is imported
            passes through unchanged, but a call that fails becomes a SpecError naming it.
    """
    if is_onnx(spec):
        return _load_onnx(spec)
    module_name, colon, attribute = spec.partition(":")
    if not (colon and all(part.isidentifier() for part in f"{module_name}.{attribute}".split("."))):
        raise SpecError(
            f"{spec!r} does not name a model: write package.module:callable, e.g. torchvision.models:resnet18, or the path of an "
            ".onnx file"
        )

    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A package that the module itself lacks is another matter than a misspelt spec, and has another remedy.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise SpecError(f"{module_name} imports {error.name}, which is not installed") from error
        raise SpecError(
            f"there is no module {error.name!r} (searched: the current folder and the installed packages)"
        ) from error

    try:
        target = attrgetter(attribute)(module)
    except AttributeError as error:
        raise SpecError(f"module {module_name!r} has no {attribute!r}: {error}") from error

    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise SpecError(f"{spec} is a {type(target).__name__}, neither an nn.Module nor something that returns one")
    try:
        model = target()
    except Exception as error:
        raise SpecError(
            f"calling {spec}() raised {type(error).__name__}: {error}\n"
            "The model is built without arguments: where it needs some, name a function that passes them."
        ) from error
    if not isinstance(model, nn.Module):
        raise SpecError(f"{spec}() returned a {type(model).__name__}, not an nn.Module")
    return model


def is_onnx(spec: str) -> bool:
    return spec.lower().endswith(".onnx")


def _load_onnx(path: str) -> nn.Module:
    from horizon_plugin_pytorch.utils.onnx_model import OnnxError, load_onnx

    try:
        return load_onnx(path)
    except (OnnxError, ImportError, FileNotFoundError) as error:
        raise SpecError(str(error)) from error


def declared_shapes(model: nn.Module) -> list[str]:
    """The shapes that an ONNX file fixes for its inputs, with a batch of 1 where that is open; none if another size is open, or
    an input does not take floats."""
    inputs = getattr(model, "onnx_inputs", ())
    shapes = [(i.shape[0] or 1, *i.shape[1:]) if i.shape else () for i in inputs]
    if any(i.dtype != torch.float32 for i in inputs) or any(None in shape or not shape for shape in shapes):
        return []
    return [",".join(map(str, shape)) for shape in shapes]


def parse_shape(text: str) -> tuple[int, ...]:
    """The shape in ``text``, e.g. ``1,3,224,224``; raises SpecError unless every size is a positive integer."""
    sizes = text.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise SpecError(f"input {text!r} is not a shape: write positive integers with commas, e.g. 1,3,224,224")
    return tuple(int(size) for size in sizes)


def example_inputs(model: nn.Module, shapes: list[str]) -> tuple[torch.Tensor, ...]:
    """One float32 tensor of standard-normal numbers per shape, the same ones at every call.

    Raises:
        SpecError: a shape cannot be read, or the model does not run on these inputs.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(parse_shape(shape), generator=generator) for shape in shapes)
    if inputs:
        try:
            with torch.no_grad():
                model(*inputs)
        except Exception as error:
            raise SpecError(
                f"the model does not run on inputs of shape {' and '.join(shapes)}: {type(error).__name__}: {error}"
            ) from error
    return inputs
