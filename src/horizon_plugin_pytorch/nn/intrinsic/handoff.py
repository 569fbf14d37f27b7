"""The anchor's place in a group with an add, fused by name.

The user's ``forward`` still calls the anchor by name and passes the result to ``FloatFunctional.add``, where the group stands now.
So the anchor's place hands its *input* on, as an `AnchorInput`: the group recognizes it in either operand position, and anything
else that touches it raises, because the anchor's output does not exist outside the group.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.errors import FusionError


class AnchorInput:
    """What an anchor would have been called with, on its way to the group that calls it.

    Any use other than handing it to the group's ``add`` or ``add_relu`` raises `FusionError` naming both places.
    """

    __slots__ = ("handoff", "kwargs", "value")

    def __init__(self, value: Tensor, kwargs: dict[str, Any], handoff: Handoff) -> None:
        self.value, self.kwargs, self.handoff = value, kwargs, handoff

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


for _name in "add radd iadd sub rsub mul rmul truediv rtruediv matmul neg pow getitem setitem len iter bool float int".split():
    setattr(AnchorInput, f"__{_name}__", _refuse(f"__{_name}__"))


def _names(handoff: Handoff) -> tuple[str, str, str]:
    """How to call the anchor's place, the group's place and the reader, found from the running model (errors only)."""
    root: nn.Module | None = None
    reader: nn.Module | None = None
    line = ""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            root = module
            if reader is None and frame.f_code.co_name != "_call_impl" and not isinstance(module, Handoff):
                reader = module
                line = f" ({frame.f_code.co_filename}:{frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    paths = {id(m): name for name, m in root.named_modules()} if root is not None else {}
    anchor = paths.get(id(handoff))
    group = next((paths[id(m)] for m in (root.modules() if root else ()) if getattr(m, "handoff", None) is handoff.token), None)
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

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> AnchorInput:
        if args:  # ConvTranspose's output_size
            kwargs = {"output_size": args[0], **kwargs}
        return AnchorInput(x, kwargs, self)


def refuse_escaped(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook: a model that returns an anchor's output which its group consumed."""
    for value in torch.utils._pytree.tree_leaves(output):
        if isinstance(value, AnchorInput):
            value.misused(f"the caller, as an output of {type(module).__name__}")
