"""The anchor's place in a group with an add, fused by name.

The user's ``forward`` still calls the anchor by name and passes the result to ``FloatFunctional.add``, where the group stands now.
So the anchor's place hands its *input* on, as an `AnchorInput`: the group recognizes it in either operand position, and anything
else that touches it raises, because the anchor's output does not exist outside the group.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.errors import FusionError


class AnchorInput:
    """What an anchor would have been called with, on its way to the group that calls it.

    Any use other than handing it to the group's ``add`` or ``add_relu`` raises `FusionError` naming both places.
    """

    __slots__ = ("consumed", "handoff", "kwargs", "value")

    def __init__(self, value: Tensor, kwargs: dict[str, Any], handoff: Handoff) -> None:
        self.value, self.kwargs, self.handoff = value, kwargs, handoff
        self.consumed = False

    def misused(self, by: str) -> NoReturn:
        anchor, group, user = _names(self.handoff)
        raise FusionError(
            f"the output of {anchor} is read by {by}{user}, but it was fused into the add of {group} and exists nowhere else. "
            f"Leave {anchor} out of the fused group, or fuse it without the add."
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, AnchorInput):
                value.misused(torch.overrides.resolve_name(func) or getattr(func, "__name__", str(func)))
        raise AssertionError("called without an AnchorInput")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # protocols probe for these
        self.misused(f"'.{name}'")


def _refuse(name: str) -> Any:
    def method(self: AnchorInput, *_: Any) -> NoReturn:
        self.misused(name)

    return method


_OPERATORS = """
    add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv rfloordiv mod rmod pow rpow matmul rmatmul
    and rand or ror xor rxor neg pos abs invert eq ne lt le gt ge getitem setitem contains len iter bool float int index array
"""
for _name in _OPERATORS.split():
    setattr(AnchorInput, f"__{_name}__", _refuse(f"__{_name}__"))


_TORCH = os.path.dirname(torch.__file__) + os.sep
_THIS_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(__file__))) + os.sep


def _names(handoff: Handoff) -> tuple[str, str, str]:
    """How to call the anchor's place, the group's place and the reader, found from the running model (errors only)."""
    root: nn.Module | None = None
    reader: nn.Module | None = None
    line = ""
    frame = sys._getframe(1)
    while frame is not None:
        module, file = frame.f_locals.get("self"), frame.f_code.co_filename
        if isinstance(module, nn.Module):
            root = module
            if reader is None and not file.startswith(_THIS_PACKAGE):
                reader = module
        if not line and not file.startswith((_TORCH, _THIS_PACKAGE)):
            line = f" ({file}:{frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    paths = {id(m): name for name, m in root.named_modules()} if root is not None else {}
    anchor = paths.get(id(handoff))
    group = next(
        (paths[id(m)] for m in (root.modules() if root else ()) if getattr(m, "handoff", None) is handoff.token), None
    )
    where = paths.get(id(reader)) if reader is not None else None
    user = f" in {where or type(reader).__name__!r}{line}" if reader is not None else ""
    return (f"'{anchor}'" if anchor else "the convolution"), (f"'{group}'" if group else "its group"), user


class Token:
    """Tells which hand-off belongs to which group; survives deepcopy and pickle together with both."""


class Handoff(nn.Module):
    """Stands where the anchor stood and hands its input on to the group that stands at the add."""

    def __init__(self) -> None:
        super().__init__()
        self.token = Token()

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> AnchorInput:
        if args:  # ConvTranspose's output_size
            kwargs = {"output_size": args[0], **kwargs}
        return AnchorInput(input, kwargs, self)


def refuse_escaped(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: a model that returns an anchor's output which its group consumed."""
    for value in torch.utils._pytree.tree_leaves(output):
        if isinstance(value, AnchorInput):
            value.misused(f"the caller, as an output of {type(module).__name__}")
