"""The fused group in float: one module for every point of the grid.

    y = activation(norm(anchor(x)) + other)

The classes users know (``ConvReLU2d``, ``ConvBNAddReLU2d``, …) are this one with its `pattern` set; `horizon.nn.intrinsic` makes
them from the table in `fusion.patterns`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.errors import FusionError
from horizon_plugin_pytorch.fusion.patterns import HOOK_TABLES, Pattern
from horizon_plugin_pytorch.nn.checkpoint import NormKeys
from horizon_plugin_pytorch.nn.intrinsic.handoff import AnchorInput, Token


class Identity(nn.Identity):
    """Stands where a module stood that moved into a group, and keeps its name in the model."""


class AddPlace:
    """A group standing where a FloatFunctional stood: answers to its ``add`` and ``add_relu``, refuses its other methods."""

    pattern: ClassVar[Pattern]
    handoff: Token | None = None  # fused by name with an add: the place the anchor's input comes from

    def _operands(self, a: Any, b: Any) -> tuple[AnchorInput, Any]:
        for first, other in ((a, b), (b, a)):
            if isinstance(first, AnchorInput) and first.handoff.token is self.handoff:
                if isinstance(other, AnchorInput):
                    other.misused("an add that another convolution was fused into")
                if first.consumed:
                    first.misused("a second add")
                first.consumed = True
                return first, other
        raise FusionError(
            f"{self.pattern.name}.add: neither operand is the output of the {self.pattern.anchor.type.__name__} fused into this add. "
            "A FloatFunctional that is used for several adds cannot be fused: give each add its own."
        )

    def add(self, a: Any, b: Any) -> Tensor:
        """`FloatFunctional.add` of the fused anchor's output and another tensor, in either order."""
        first, other = self._operands(a, b)
        return self(first.value, other, **first.kwargs)  # type: ignore[operator]

    def add_relu(self, a: Any, b: Any) -> Tensor:
        """`FloatFunctional.add_relu`: add, then ReLU."""
        return torch.relu(self.add(a, b))

    def _no_method(self, *_: Any, **__: Any) -> Any:
        raise FusionError(
            f"{self.pattern.name} stands where a FloatFunctional stood and only adds; another of its methods was called. "
            "Give that call a FloatFunctional of its own."
        )

    add_scalar = mul = mul_scalar = cat = matmul = sub = _no_method


class FusedGroup(AddPlace, nn.Module):
    """anchor -> [norm] -> [add] -> [activation] as one module.

    Args:
        modules: the group's modules in this order, without the add, e.g. ``ConvBNAddReLU2d(conv, bn, relu)``. They are held
            as they are, under ``conv`` (``linear``), ``bn`` and ``relu`` (``relu6``).

    Shapes and dtypes are those of the anchor; with an add the second argument of `forward` is the other operand.
    `weight` and `bias` are the anchor's.
    """

    pattern: ClassVar[Pattern]

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        pattern = self.pattern
        names = [pattern.anchor.child]
        if pattern.norm:
            names.append("bn")
        if pattern.activation:
            names.append(pattern.activation.child)
        if len(names) != len(modules):
            raise TypeError(f"{pattern.name} takes {len(names)} modules ({', '.join(names)}), not {len(modules)}")
        for name, module in zip(names, modules, strict=True):
            self.add_module(name, module)
        self.training = modules[0].training
        self.norm_keys: NormKeys | None = None
        self.keys_elsewhere: tuple[str, ...] = ()  # children whose checkpoint keys another place holds

    # -- its parts ----------------------------------------------------------------------------------------------------------

    @property
    def anchor(self) -> nn.Module:
        return self._modules[self.pattern.anchor.child]  # type: ignore[return-value]

    @property
    def norm(self) -> nn.Module | None:
        return self._modules.get("bn")

    @property
    def activation(self) -> nn.Module | None:
        return self._modules[self.pattern.activation.child] if self.pattern.activation else None

    @property
    def weight(self) -> Tensor:
        return self.anchor.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.anchor.bias  # type: ignore[return-value]

    # -- computing ----------------------------------------------------------------------------------------------------------

    def forward(self, input: Tensor, *operands: Any, **kwargs: Any) -> Tensor:
        """The group's result; `operands` is the add's other operand, further arguments are the anchor's."""
        if not self.pattern.add:
            kwargs.update(zip(("output_size",), operands, strict=False))
            return self._finish(self._linear(input, kwargs))
        if len(operands) != 1:
            raise TypeError(
                f"{self.pattern.name} takes the anchor's input and the add's other operand; fused by name, call .add()"
            )
        return self._finish(torch.add(self._linear(input, kwargs), operands[0]))

    def _linear(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        y = self.anchor(x, **kwargs)
        return y if self.norm is None else self.norm(y)

    def _finish(self, y: Tensor) -> Tensor:
        return y if self.activation is None else self.activation(y)

    # -- checkpoints --------------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        destination = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for child in self.keys_elsewhere:
            for key in [k for k in destination if k.startswith(f"{prefix}{child}.")]:
                del destination[key]
        return destination

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for name in self.keys_elsewhere:
            child = self._modules[name]
            assert child is not None
            unexpected.extend(k for k in state_dict if k.startswith(f"{prefix}{name}."))
            # The child is loaded through its place; here it is handed what it already has.
            state_dict.update(child.state_dict(prefix=f"{prefix}{name}.", keep_vars=True))

    # -- absorbing BN later -------------------------------------------------------------------------------------------------

    def absorb_norm(self) -> None:
        """Absorb the kept batch norm; the group becomes the one of the pattern without norm, in place."""
        from horizon_plugin_pytorch.nn.intrinsic import group_class

        assert self.norm is not None
        if self.norm_keys is None:  # built by hand: its keys are its own, and stay readable
            names = {n: f"bn.{n}" for n in self.norm.state_dict()}
            self.norm_keys = NormKeys(self.pattern.anchor, self.anchor, self.norm, names)
            self._register_load_state_dict_pre_hook(self.norm_keys.load)
        self.norm_keys.absorb()
        del self._modules["bn"]
        self.keys_elsewhere = tuple(name for name in self.keys_elsewhere if name != "bn")
        p = self.pattern
        self.__class__ = group_class(Pattern(p.anchor, False, p.add, p.activation))

    def _get_name(self) -> str:
        return self.pattern.name


def move_hooks(source: nn.Module, target: nn.Module, *tables: str) -> None:
    """Move forward hooks to another module; handles a user holds stay valid, as the table itself moves."""
    for table in tables:
        assert table in HOOK_TABLES
        for name in (table, f"{table}_with_kwargs", f"{table}_always_called"):
            if name in source.__dict__:
                moved = source.__dict__[name]
                moved.update(target.__dict__[name])
                setattr(target, name, moved)
                setattr(source, name, type(moved)())
