"""A fused group on integers: anchor, absorbed norm, add and activation with one rounding at the end.

    acc = sum x_q * w_q + bias_q;   y = acc * m;   y = fma(r_q, s_r / s_y, y);   y = activation(y);   y_q = clamp(round(y))

`freeze` makes the constants that do not depend on the input's scale, `GroupConstants.derive` the ones that do, and `run_group` is the
arithmetic. A QAT group in evaluation calls the same three functions, so that it equals what it converts to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.fusion.absorb_bn import bn_factor_and_shift, norm_tensors
from horizon_plugin_pytorch.fusion.patterns import RELU, RELU6, Anchor, Pattern
from horizon_plugin_pytorch.nn.intrinsic.group import AddPlace
from horizon_plugin_pytorch.nn.quantized import compiled
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor, quantize
from horizon_plugin_pytorch.nn.quantized.tensors import MakesIntegers, Remembered

CLAMPS = {RELU: "relu", RELU6: "relu6", None: None}
"""Activations with a form on integers; any other runs in float32 between the accumulator and the rounding."""


def epilogue_scale(pattern: Pattern, scale: Tensor | None) -> Tensor | None:
    """The scale in whose units sums are carried on: the output's, or None (1) where an activation without a form on integers
    follows, or no rounding."""
    return scale if pattern.activation in CLAMPS else None


@dataclass(frozen=True)
class Geometry:
    """How an anchor walks over its input: what Conv, ConvTranspose and Linear have besides their weight."""

    dims: int  # 0: Linear
    transposed: bool = False
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, row: Anchor, module: Any) -> Geometry:
        if row.child == "linear":
            return cls(0)
        return cls(
            len(module.kernel_size), row.transposed, tuple(module.kernel_size), tuple(module.stride),
            module.padding if isinstance(module.padding, str) else tuple(module.padding), tuple(module.dilation),
            tuple(module.output_padding), module.groups, module.padding_mode,
        )  # fmt: skip

    @property
    def weight_axis(self) -> int:
        """The dimension of the weight that holds output channels."""
        return 1 if self.transposed else 0

    def channel_axis(self, y: Tensor) -> int:
        """The dimension of the output that holds channels."""
        return y.dim() - 1 - self.dims

    def depthwise(self, weight: Tensor) -> bool:
        inputs = weight.shape[0] if self.transposed else weight.shape[1] * self.groups
        return self.groups > 1 and self.groups == inputs

    def _pads(self) -> list[int]:
        """`torch.nn.functional.pad`'s list for a padding mode other than zeros."""
        if self.padding == "valid":
            return [0] * 2 * self.dims
        if isinstance(self.padding, str):  # same
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return [n for t in reversed(totals) for n in (t // 2, t - t // 2)]
        return [p for p in reversed(self.padding) for _ in range(2)]

    def _extra(self, x: Tensor, output_size: Any) -> tuple[int, ...]:
        """ConvTranspose's output_padding for a wanted output size."""
        if output_size is None:
            return self.output_padding
        wanted = list(output_size)[-self.dims :]
        padding: Any = self.padding
        least = [
            (n - 1) * s - 2 * int(p) + d * (k - 1) + 1
            for n, s, p, d, k in zip(
                x.shape[-self.dims :], self.stride, padding, self.dilation, self.kernel_size, strict=True
            )
        ]
        return tuple(w - n for w, n in zip(wanted, least, strict=True))

    def accumulate(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Any = None) -> Tensor:
        """int32 accumulator of integer tensors."""
        if self.dims == 0:
            return reference.linear(x, weight, bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = reference.pad(x, self._pads(), self.padding_mode), (0,) * self.dims
        return reference.conv(
            x, weight, bias, self.stride, padding, self.dilation, self.groups,
            transposed=self.transposed, output_padding=self._extra(x, output_size) if self.transposed else 0,
        )  # fmt: skip

    def differentiable(self, x: Tensor, weight: Tensor, output_size: Any = None) -> Tensor:
        """The same sum in floating point, for training."""
        if self.dims == 0:
            return F.linear(x, weight)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._pads(), self.padding_mode), 0
        if self.transposed:
            conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.dims - 1]
            return conv(x, weight, None, self.stride, padding, self._extra(x, output_size), self.groups, self.dilation)
        return (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1](
            x, weight, None, self.stride, padding, self.dilation, self.groups
        )


class GroupConstants(NamedTuple):
    """An anchor with its norm absorbed, before the input's scale is known.

    weight: int8; scale: float32 ``[C_out]``, the weight's, BN's factor included; bias: float64 ``[C_out]`` or None.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def derive(self, geometry: Geometry, s_x: Tensor, s_y: Tensor | None, s_r: Tensor | None) -> DerivedConstants:
        weight, s_w, bias = reference.absorb(
            self.weight, self.scale, None, self.bias, s_x, geometry.weight_axis, geometry.groups
        )
        return DerivedConstants(weight, bias, *reference.group_multipliers(s_x, s_w, s_y, s_r))


class DerivedConstants(NamedTuple):
    """What the arithmetic needs: int8 weight, int32 bias, and the float32 multipliers."""

    weight: Tensor
    bias: Tensor
    m: Tensor
    residual_ratio: Tensor | None
    bound: Tensor


@torch.no_grad()
def freeze(row: Anchor, anchor: nn.Module, norm: nn.Module | None, s_w: Tensor) -> GroupConstants:
    """Quantize an anchor's raw weight with `s_w` and absorb its norm into the scale and the bias."""
    axis, groups = (1 if row.transposed else 0), row.groups(anchor)
    weight: Tensor = anchor.weight  # type: ignore[assignment]
    own: Any = anchor.bias
    bias: Tensor | None = None if own is None else own.double()
    w_q = reference.quantize_weight(weight, s_w, axis, groups)
    k = None
    if norm is not None:
        k, shift = bn_factor_and_shift(norm_tensors(norm), norm.eps)  # type: ignore[arg-type]
        bias = shift if bias is None else bias * k + shift
    w_q, s, _ = reference.absorb(w_q, s_w, k, None, torch.ones_like(s_w[:1]).reshape(()), axis, groups)
    return GroupConstants(w_q, s, bias)


def run_group(
    pattern: Pattern,
    geometry: Geometry,
    constants: DerivedConstants,
    x: QTensor,
    other: QTensor | None,
    activation: nn.Module | None,
    scale: Tensor | None,
    dtype8: torch.dtype,
    output_size: Any = None,
    path: str = "",
) -> Tensor:
    """The group's integers, or its float32 value where `scale` is None (a high-precision output); `path` is for errors."""
    acc = geometry.accumulate(x.payload, constants.weight, constants.bias, output_size)
    vectors = x.scale.dim() > 0 or (scale is not None and scale.dim() > 0)
    if vectors and acc.dim() != geometry.dims + 2:
        raise QuantizationError(
            f"{path!r} has scales per channel, which are for inputs with a batch dimension; this one has {acc.dim()} dimensions. Give "
            "prepare_qat_fx example_inputs of the kind that the model will get"
        )
    clamp = pattern.activation in CLAMPS
    y = reference.epilogue(
        acc,
        constants.m,
        residual=None if other is None else other.payload,
        residual_ratio=constants.residual_ratio,
        activation=CLAMPS[pattern.activation] if clamp else None,
        bound=constants.bound,
        dtype=dtype8 if scale is not None and clamp else torch.float32,
        axis=geometry.channel_axis(acc),
    )
    if clamp:
        return y
    assert activation is not None
    y = activation(y)
    return y if scale is None else quantize(y, scale, dtype8, path).payload


class QuantizedGroup(MakesIntegers, AddPlace, nn.Module):
    """A converted group. Its class is named by the pattern without norm, e.g. ``ConvAddReLU2d``.

    Buffers:
        weight: int8, shaped as the float anchor's.
        weight_scale: float32 ``[C_out]``, BN's factor included.
        bias: float64 ``[C_out]``; quantized to int32 with the input's scale (see `integers`).
        scale: float32, the output's, one value or one per channel; absent for a high-precision output.
    """

    pattern: ClassVar[Pattern]
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        geometry: Geometry,
        constants: GroupConstants,
        scale: Tensor | None,
        dtype8: torch.dtype,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.geometry, self.dtype8 = geometry, dtype8
        self.register_buffer("weight", constants.weight)
        self.register_buffer("weight_scale", constants.scale)
        self.register_buffer("bias", constants.bias)
        self.register_buffer("scale", scale)
        self.activation = activation if self.pattern.activation not in CLAMPS else None
        self.float_calls: Counter[str] = Counter()
        self.path = ""
        self._derived: Remembered[DerivedConstants] = Remembered(
            8
        )  # a group can be shared by calls with inputs of other scales
        self.eval()

    @property
    def high_precision(self) -> bool:
        return self.scale is None

    def integers(self, s_x: Tensor, s_r: Tensor | None = None) -> DerivedConstants:
        """int8 weight, int32 bias and float32 multipliers for inputs of these scales."""
        own = GroupConstants(self.weight, self.weight_scale, self.bias)
        s_y = epilogue_scale(self.pattern, self.scale)
        return self._derived.get((s_x, s_r, *own, s_y), None, lambda: own.derive(self.geometry, s_x, s_y, s_r))

    def forward(self, input: QTensor, *operands: Any, output_size: Any = None) -> Tensor:
        """int8 or uint8 `QTensor` in and out; float32 out where the output is high-precision."""
        x = input
        other = operands[0] if self.pattern.add else None
        if not self.pattern.add and operands:
            output_size = operands[0]
        require_quantized(self, x, other)
        if torch.compiler.is_compiling():
            return compiled.call(self, (x,) if other is None else (x, other), sizes=output_size or ())
        constants = self.integers(x.scale, None if other is None else other.scale)
        y = run_group(
            self.pattern, self.geometry, constants, x, other, self.activation, self.scale, self.dtype8, output_size, self.path
        )  # fmt: skip
        return y if self.scale is None else QTensor.make(y, self.scale, self.dtype8, self.float_calls)

    def uncompiled(self, method: str, xs: Sequence[Tensor], sizes: Sequence[int], number: float | None) -> Tensor:
        return self(*xs, output_size=list(sizes) or None)

    def float_form(self, method: str, xs: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        y = self.geometry.differentiable(xs[0], xs[0].new_empty(self.weight.shape), list(sizes) or None)
        return y + xs[1] if len(xs) > 1 else y

    def extra_repr(self) -> str:
        shape = "x".join(map(str, self.weight.shape))
        return f"weight={shape}, output={'float32' if self.scale is None else str(self.dtype8).removeprefix('torch.')}"

    def _get_name(self) -> str:
        return f"Quantized{self.pattern.name}"


def require_quantized(module: nn.Module, *inputs: Any) -> None:
    """Raise if a tensor that arrives is not quantized."""
    for x in inputs:
        if x is not None and not isinstance(x, QTensor):
            name = getattr(module, "path", "") or type(module).__name__
            raise QuantizationError(
                f"{name!r} got a float tensor where it computes in integers: put a QuantStub before it, or leave it in float with "
                "qconfig None."
            )
