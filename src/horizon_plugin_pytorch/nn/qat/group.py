"""A fused group in training: the float group with its weight and its output quantized.

In training mode the convolution runs on integer-valued tensors and the epilogue on its result, with straight-through
gradients; in eval mode the group runs the integer arithmetic that it converts to. The norm, if kept, normalizes with batch
statistics in training and is absorbed into the weight's scale and the bias in eval; nothing is ever divided by gamma.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from horizon_plugin_pytorch.fusion.patterns import RELU, RELU6, Pattern
from horizon_plugin_pytorch.nn.intrinsic.group import FusedGroup
from horizon_plugin_pytorch.nn.qat.autograd import WEIGHT_UNIT, Affine
from horizon_plugin_pytorch.nn.qat.fake_quantize import FakeQuantize, FakeQuantState
from horizon_plugin_pytorch.nn.qat.modes import in_floating_point, in_integers, without_autocast
from horizon_plugin_pytorch.nn.qat.weight import WeightFakeQuantize
from horizon_plugin_pytorch.nn.quantized.group import (
    CLAMPS,
    Geometry,
    epilogue_scale,
    freeze,
    require_quantized,
    run_group,
)
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor, dequantize


class QATGroup(FusedGroup):
    """The QAT form of a `FusedGroup`, made from one in place by `prepare`.

    Attributes:
        weight_quant: `WeightFakeQuantize`.
        output_quant: `FakeQuantize`, or None for a high-precision (float32) output.
    """

    quantizes_inputs = True
    weight_quant: WeightFakeQuantize
    output_quant: FakeQuantize | None
    geometry: Geometry
    state: FakeQuantState
    path: str

    def set_up(self, weight_quant: WeightFakeQuantize, output_quant: FakeQuantize | None, path: str) -> None:
        self.weight_quant, self.output_quant = weight_quant, output_quant
        self.geometry = Geometry.of(self.pattern.anchor, self.anchor)
        self.state, self.path = FakeQuantState.FLOAT, path
        weight_quant.train(self.training)
        self.finish()
        if output_quant is not None:
            output_quant.path = f"{path}.output_quant"
            output_quant.train(self.training)
            if self.pattern.activation in (RELU, RELU6):
                output_quant.nonnegative()
            if self.pattern.activation is not None:
                output_quant.limit = self.pattern.activation.bound

    def finish(self) -> None:
        """Let the weight's scale start from the weight as it is, when the group is made and when calibration ends."""
        self.weight_quant.start(self.weight, *self._layout)

    def forward(self, input: Tensor, *operands: Any, **kwargs: Any) -> Tensor:
        x = input
        if not self.state.quantizes:
            y = super().forward(dequantize(x), *map(dequantize, operands), **kwargs)
            if self.output_quant is not None and self.state is FakeQuantState.CALIBRATION:
                self.output_quant.observe(y)
            return y
        other = operands[0] if self.pattern.add else None
        output_size = kwargs.get("output_size", operands[0] if operands and not self.pattern.add else None)
        require_quantized(self, x, other)
        if self.training:
            return self._train(x, other, output_size)  # type: ignore[arg-type]
        integers: Any = in_integers(self, x, other)  # type: ignore[arg-type]
        return self._integers(integers[0], integers[1], output_size)

    @property
    def _layout(self) -> tuple[int, int]:
        return self.geometry.weight_axis, self.geometry.groups

    def _train(self, x: QTensor, other: QTensor | None, output_size: Any) -> Tensor:
        weight, s_w = self.weight_quant.integers(self.weight, *self._layout)
        acc = self.geometry.differentiable(in_floating_point(x), weight, output_size)
        s_x = x.scale
        if s_x.dim() > 0:  # one per input channel, depthwise: an input channel's outputs stand together
            s_x = s_x.repeat_interleave(s_w.numel() // s_x.numel())
        shape = [1] * acc.dim()
        shape[self.geometry.channel_axis(acc)] = -1
        bias = None if self.bias is None else self.bias.view(shape)
        with without_autocast(acc.device.type):
            y = Affine.apply(acc, (s_x * s_w / WEIGHT_UNIT).view(shape), bias)
            if self.norm is not None:
                y = self.norm(y)
            if other is not None:
                scale = other.scale if other.scale.dim() == 0 else other.scale.view(shape)
                y = torch.addcmul(y, in_floating_point(other).float(), scale)
        row, quant = self.pattern.activation, self.output_quant
        if row in CLAMPS and quant is not None:
            return quant.train_quantize(y, relu=row is not None, bound=row.bound if row else None, fresh=True)
        y = y if self.activation is None else self.activation(y)
        return y if quant is None else quant.train_quantize(y)

    @torch.no_grad()
    def _integers(self, x: QTensor, other: QTensor | None, output_size: Any) -> Tensor:
        s_w = self.weight_quant.scales(self.weight, *self._layout)
        quant = self.output_quant
        s_y = None if quant is None else quant.current_scale()
        frozen = freeze(self.pattern.anchor, self.anchor, self.norm, s_w)
        unit = epilogue_scale(self.pattern, s_y)
        constants = frozen.derive(self.geometry, x.scale, unit, None if other is None else other.scale)
        dtype8 = torch.int8 if quant is None else quant.dtype8
        y = run_group(
            self.pattern, self.geometry, constants, x, other, self.activation, s_y, dtype8, output_size, self.path
        )
        return y if quant is None or s_y is None else QTensor.make(y, s_y, quant.dtype8, quant.float_calls)

    def absorb_norm(self) -> None:
        super().absorb_norm()
        from horizon_plugin_pytorch.nn.qat import qat_group_class

        p = self.pattern
        self.__class__ = qat_group_class(Pattern(p.anchor, False, p.add, p.activation))

    def _get_name(self) -> str:
        return f"QAT{self.pattern.name}"
