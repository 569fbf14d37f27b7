"""`QTensor`: integers with their scale, as they flow between the modules of a quantized model.

PyTorch functions that only move data act on the integers; the ones listed in `_RULES` follow their row of the numerics; every other
function gets the dequantized float32 value, and the call is counted, for the report, at the module that made the integers.

In a model that is being trained the integers are carried in a floating-point tensor (8-bit integers are exact there, in bfloat16
and float16, too), so that gradients flow; in evaluation and after convert they are ``torch.int8`` or ``torch.uint8``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from horizon_plugin_pytorch.backends import reference


class QTensor(torch.Tensor):
    """Integers `q` and a scale `s`; the value is ``q * s``, the zero point 0.

    Attributes:
        scale: float32, one value, or one per channel (dim 1) where the tensor feeds only depthwise convolutions.
        dtype8: ``torch.int8`` or ``torch.uint8``, the integers' range, also while a float tensor carries them.
        float_calls: names of functions that had no rule and ran in float on this module's output; shared with the module.
    """

    scale: Tensor
    dtype8: torch.dtype
    float_calls: Counter[str]

    @staticmethod
    def make(payload: Tensor, scale: Tensor, dtype8: torch.dtype, float_calls: Counter[str] | None = None) -> QTensor:
        result = payload.as_subclass(QTensor)
        result.scale, result.dtype8 = scale, dtype8
        result.float_calls = Counter() if float_calls is None else float_calls
        return result

    @property
    def payload(self) -> Tensor:
        """The integers as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)

    def int_repr(self) -> Tensor:
        """The integers, ``torch.int8`` or ``torch.uint8``."""
        return self.payload.detach().to(self.dtype8)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        """The value, float32."""
        payload = self.payload
        if not payload.is_floating_point():
            return reference.dequantize(payload, self.scale, None if self.scale.dim() == 0 else 1)
        return payload.float() * along_channels(self.scale, payload)

    def like(self, payload: Tensor, scale: Tensor | None = None) -> QTensor:
        """Other integers with the same scale (or `scale`)."""
        return QTensor.make(payload, self.scale if scale is None else scale, self.dtype8, self.float_calls)

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"QTensor({self.payload}, scale={self.scale}, dtype={self.dtype8})"

    def __deepcopy__(self, memo: Any) -> QTensor:
        return self.like(self.payload.detach().clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return QTensor.make, (self.payload.detach(), self.scale, self.dtype8)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name == "__get__" or func in _QUERIES:
                return func(*args, **kwargs)
            rule = _RULES.get(func)
            if rule is not None:
                result = rule(func, args, kwargs)
                if result is not NotImplemented:
                    return result
        return _in_float(func, args, kwargs)


def along_channels(scale: Tensor, x: Tensor) -> Tensor:
    """A scale per channel in the shape that broadcasts against ``x[N, C, ...]``."""
    return scale if scale.dim() == 0 else scale.view(1, -1, *[1] * (x.dim() - 2))


def dequantize(x: Any) -> Any:
    """The float value of a QTensor; anything else as it is."""
    return x.dequantize() if isinstance(x, QTensor) else x


def _in_float(func: Any, args: Any, kwargs: Any) -> Any:
    """A function without a rule: dequantize, run in float32, and say so."""

    def convert(x: Any) -> Any:
        if isinstance(x, QTensor):
            x.float_calls[torch.overrides.resolve_name(func) or getattr(func, "__name__", str(func))] += 1
            return x.dequantize()
        return x

    args, kwargs = torch.utils._pytree.tree_map(convert, (args, kwargs))
    return func(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------------
# Rules. Each gets the function and its arguments and returns NotImplemented where it does not apply.

Rule = Callable[[Any, Any, Any], Any]


def _rewrap(q: QTensor, result: Any) -> Any:
    if isinstance(result, Tensor):
        return q.like(result)
    return type(result)(q.like(r) for r in result)


def _move(func: Any, args: Any, kwargs: Any) -> Any:
    """Data moves, values do not change; with a scale per channel the channels would lose their scales."""
    q = args[0]
    if not isinstance(q, QTensor) or q.scale.dim() > 0:
        return NotImplemented
    return _rewrap(q, func(q.payload, *args[1:], **kwargs))


def _keep(func: Any, args: Any, kwargs: Any) -> Any:
    """As `_move`, for functions that keep every element where it is."""
    q = args[0]
    return q.like(func(q.payload, *args[1:], **kwargs))


def _to(func: Any, args: Any, kwargs: Any) -> Any:
    q, rest = args[0], [*args[1:], *kwargs.values()]
    if any(isinstance(a, torch.dtype) or isinstance(a, Tensor) for a in rest):
        return NotImplemented
    payload = func(q.payload, *args[1:], **kwargs)
    return q.like(payload, q.scale.to(payload.device))


def _max_pool(dims: int, func: Any, args: Any, kwargs: Any) -> Any:
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
    call = dict(zip(names, args, strict=False)) | kwargs
    q = call.pop("input")
    if call.pop("return_indices", False):
        return NotImplemented
    if q.payload.is_floating_point():
        return q.like(func(q.payload, **call))
    return q.like(reference.max_pool(q.payload, dims=dims, **call))


def _interpolate(func: Any, args: Any, kwargs: Any) -> Any:
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    call = dict(zip(names, args, strict=False)) | kwargs
    q, mode = call["input"], call.get("mode", "nearest")
    if not mode.startswith("nearest") or call.get("recompute_scale_factor"):
        return NotImplemented
    if q.payload.is_floating_point():
        return q.like(func(q.payload, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}))
    exact = mode == "nearest-exact"
    return q.like(reference.upsample_nearest(q.payload, call.get("size"), call.get("scale_factor"), exact=exact))


def _pad(func: Any, args: Any, kwargs: Any) -> Any:
    call = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    q = call["input"]
    if call.get("mode", "constant") == "constant":
        if call.get("value") not in (None, 0, 0.0) or q.scale.dim() > 0 and len(call["pad"]) > 2 * (q.dim() - 2):
            return NotImplemented
        return q.like(F.pad(q.payload, call["pad"]))
    if q.payload.is_floating_point():
        return q.like(F.pad(q.payload, call["pad"], mode=call["mode"]))
    return q.like(reference.pad(q.payload, call["pad"], call["mode"]))


def _relu(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0].like(args[0].payload.clamp(min=0))


def _dropout(func: Any, args: Any, kwargs: Any) -> Any:
    """What is left is divided by 1 - p: the scale is, so that the integers stay integers."""
    call = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
    q, p = call["input"], call.get("p", 0.5)
    if not call.get("training", True) or p == 0:
        return q
    if p == 1 or not q.payload.is_floating_point():
        return NotImplemented
    kept = func(torch.ones_like(q.payload), p, True) * (1 - p)
    return q.like(q.payload * kept.round(), q.scale / (1 - p))


def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    """Operands of one scale are copied; others go through a cat with an output scale of its own, or run in float."""
    tensors = args[0] if args else kwargs["tensors"]
    first = tensors[0]
    if not all(isinstance(t, QTensor) for t in tensors) or first.scale.dim() > 0:
        return NotImplemented
    if not all(t.scale is first.scale and t.dtype8 == first.dtype8 for t in tensors):
        return NotImplemented
    return first.like(func([t.payload for t in tensors], *args[1:], **{k: v for k, v in kwargs.items() if k != "tensors"}))


_T = torch.Tensor
_QUERIES: set[Any] = {
    _T.size, _T.dim, _T.numel, _T.stride, _T.is_contiguous, _T.is_floating_point, _T.element_size, _T.storage_offset, _T.nelement,
    _T.data_ptr, _T.get_device, _T.ndimension, _T.__len__, _T.is_complex, _T.is_signed, torch.numel, torch.is_floating_point,
    _T.untyped_storage, _T.register_hook, _T.retain_grad, _T.__hash__, _T.as_subclass, _T.is_shared, torch.is_complex,
    _T.requires_grad_, _T.backward,
}  # fmt: skip
_MOVES = [
    _T.view, _T.reshape, torch.reshape, _T.flatten, torch.flatten, _T.unflatten, torch.unflatten, _T.permute, torch.permute,
    _T.transpose, torch.transpose, _T.squeeze, torch.squeeze, _T.unsqueeze, torch.unsqueeze, _T.__getitem__, _T.expand, _T.expand_as,
    _T.chunk, torch.chunk, _T.split, torch.split, _T.select, torch.select, _T.narrow, torch.narrow, _T.index_select,
    torch.index_select, _T.roll, torch.roll, _T.flip, torch.flip, _T.unbind, torch.unbind, _T.repeat, _T.view_as, _T.reshape_as,
    torch.pixel_shuffle, torch.pixel_unshuffle, torch.channel_shuffle, _T.movedim, torch.movedim, _T.t, _T.mT.__get__, _T.T.__get__,
    _T.swapaxes, torch.swapaxes, _T.tile, torch.tile,
]  # fmt: skip
_KEEPS = [_T.contiguous, _T.clone, torch.clone, _T.detach, torch.detach]
_RULES: dict[Any, Rule] = {
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(_KEEPS, _keep),
    **dict.fromkeys([_T.to, _T.cpu, _T.cuda], _to),
    **{getattr(m, f"max_pool{d}d"): partial(_max_pool, d) for m in (torch, F) for d in (1, 2, 3)},
    **dict.fromkeys([F.relu, torch.relu, torch.relu_, _T.relu, _T.relu_], _relu),
    **dict.fromkeys([F.dropout, F.dropout2d, F.dropout3d], _dropout),
    **dict.fromkeys([torch.cat, torch.concat, torch.concatenate], _cat),
    F.interpolate: _interpolate,
    F.pad: _pad,
}
