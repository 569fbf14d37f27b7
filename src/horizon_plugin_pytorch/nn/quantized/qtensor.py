"""`QTensor`: integers with their scale, as they flow between the modules of a quantized model.

To code that gets one it is the float32 tensor it stands for: `dtype` says float32, and every function computes on the value ``q * s``.
Functions that only move data act on the integers (`MOVES`); the others in `RULES` follow their row of the numerics; a function
without a rule gets the dequantized value, and the call is counted, for the report, at the module that made the integers.
Integers cannot be changed in place to values they do not hold, so that raises. (`torch.tensor(q)`, `torch.Tensor(q)` and
`torch.vmap` look at the memory without asking the type, so they see integers: give them `dequantize`.)

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
from torch.utils._pytree import tree_leaves, tree_map

from horizon_plugin_pytorch.backends import reference
from horizon_plugin_pytorch.errors import QuantizationError


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
            return torch.ops.aten.alias(self)

    def int_repr(self) -> Tensor:
        """The integers, ``torch.int8`` or ``torch.uint8``."""
        return self.payload.detach().to(self.dtype8)

    def dequantize(self) -> Tensor:
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
        with torch._C.DisableTorchFunctionSubclass():
            if func in _QUERIES:
                return func(*args, **kwargs)
            if func in (_T.is_floating_point, torch.is_floating_point):
                return True
            if getattr(func, "__name__", "") in ("__get__", "__set__"):
                return _attribute(func, args)
            rule = RULES.get(func)
            if rule is not None:
                result = rule(func, args, kwargs)
                if result is not NotImplemented:
                    return result
        return _in_float(func, args, kwargs)


def along_channels(scale: Tensor, x: Tensor) -> Tensor:
    """A scale per channel in the shape that broadcasts against ``x[N, C, ...]``."""
    return scale if scale.dim() == 0 else scale.view(1, -1, *[1] * (x.dim() - 2))


def dequantize(x: Any) -> Any:
    """The float value of a QTensor, also in tuples, lists and dicts; anything else as it is."""
    if isinstance(x, QTensor):
        return x.dequantize()
    if isinstance(x, (tuple, list, dict)):
        return tree_map(dequantize, x)
    return x


def quantize(
    x: Tensor, scale: Tensor, dtype8: torch.dtype, path: str, float_calls: Counter[str] | None = None
) -> QTensor:
    """``clamp(round_half_even(x / scale), lo, hi)``; a vector of scales runs along dim 1.

    Raises:
        QuantizationError: `x` holds NaN, or the scale is not positive and finite; it names `path`.
    """
    try:
        q = reference.quantize(x, scale, dtype8, None if scale.dim() == 0 else 1)
    except ValueError as error:
        raise QuantizationError(f"{path!r}: {error}") from None
    return QTensor.make(q, scale, dtype8, float_calls)


def _in_float(func: Any, args: Any, kwargs: Any) -> Any:
    """A function without a rule: dequantize, run in float32, and say so."""
    _refuse_in_place(func, args, kwargs)

    def convert(x: Any) -> Any:
        if isinstance(x, QTensor):
            if not torch.compiler.is_compiling():
                x.float_calls[_name(func)] += 1
            return x.dequantize()
        return x

    args, kwargs = tree_map(convert, (args, kwargs))
    return func(*args, **kwargs)


def _name(func: Any) -> str:
    return torch.overrides.resolve_name(func) or getattr(func, "__name__", str(func))


_IN_PLACE = {
    "__setitem__",
    *(f"__i{n}__" for n in "add sub mul truediv floordiv mod pow and or xor matmul lshift rshift".split()),
}


def _refuse_in_place(func: Any, args: Any, kwargs: Any) -> None:
    """Changes of a QTensor's values would go to the dequantized copy and be lost."""
    if torch.compiler.is_compiling():
        return  # names of functions cannot be looked at there; the model was calibrated, and would have been refused then
    name = getattr(func, "__name__", "")
    changed: list[Any] = [kwargs.get("out")]
    if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        changed.append(args[0] if args else kwargs.get("input"))
    if any(isinstance(x, QTensor) for x in tree_leaves(changed)):
        raise QuantizationError(
            f"{_name(func)} would change a quantized tensor in place, which holds 8-bit integers: write it so that it returns a new "
            "tensor (x = x + y instead of x += y; better FloatFunctional.add), or put a DeQuantStub before it"
        )


def _attribute(func: Any, args: Any) -> Any:
    """``q.shape``, ``q.T``, ``q.data`` and the like; `func` is the attribute's getter or setter."""
    name = getattr(func.__self__, "__name__", "")
    if func.__name__ == "__set__":
        if name in ("data", "real", "imag"):
            _refuse_in_place(_T.copy_, args, {})
        return func(*args)
    if name == "dtype":
        return torch.float32
    result = func(*args)
    if not isinstance(result, Tensor) or name in ("grad", "_grad"):
        return result
    q = args[0]
    if name in ("data", "real"):
        return q.like(result, q.scale.detach() if name == "data" else None)
    if q.scale.dim() == 0 and name in ("T", "mT", "H", "mH"):
        return q.like(result)
    return _in_float(func, args, {})


# ---------------------------------------------------------------------------------------------------------------------------
# Rules. Each gets the function and its arguments and returns NotImplemented where it does not apply.

Rule = Callable[[Any, Any, Any], Any]


def _split(args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """The tensor, given first or as ``input=``, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs.get("input"), (), {k: v for k, v in kwargs.items() if k != "input"}


def _named(names: str, args: Any, kwargs: Any) -> dict[str, Any]:
    return dict(zip(names.split(), args, strict=False)) | kwargs


def _rewrap(q: QTensor, result: Any) -> Any:
    if isinstance(result, Tensor):
        return q.like(result)
    return type(result)(q.like(r) for r in result)


def _move(func: Any, args: Any, kwargs: Any) -> Any:
    """Data moves, values do not change; with a scale per channel the channels would lose their scales."""
    q, args, kwargs = _split(args, kwargs)
    if not isinstance(q, QTensor) or q.scale.dim() > 0:
        return NotImplemented
    rest = tree_leaves((args, kwargs))
    if any(isinstance(a, torch.dtype) for a in rest):  # view(dtype) reads the memory as something else
        return NotImplemented
    if any(isinstance(a, QTensor) for a in rest) and not func.__name__.endswith("_as"):
        return NotImplemented
    return _rewrap(q, func(q.payload, *args, **kwargs))


def _move_as_float(func: Any, args: Any, kwargs: Any) -> Any:
    """As `_move`, for functions without a kernel for integers."""
    q, args, kwargs = _split(args, kwargs)
    if q.scale.dim() > 0:
        return NotImplemented
    return q.like(func(q.payload.float(), *args, **kwargs).to(q.payload.dtype))


def _iterate(func: Any, args: Any, kwargs: Any) -> Any:
    rows = _move(torch.unbind, args, kwargs)
    return rows if rows is NotImplemented else iter(rows)


def _keep(func: Any, args: Any, kwargs: Any) -> Any:
    """As `_move`, for functions that keep every element where it is."""
    q, args, kwargs = _split(args, kwargs)
    return q.like(func(q.payload, *args, **kwargs), q.scale.detach() if func.__name__ == "detach" else None)


def _to(func: Any, args: Any, kwargs: Any) -> Any:
    """Of the conversions only those to a device."""
    q, rest = args[0], [*args[1:], *kwargs.values()]
    if not isinstance(q, QTensor) or any(isinstance(a, (torch.dtype, Tensor)) for a in rest):
        return NotImplemented
    payload = func(q.payload, *args[1:], **kwargs)
    return q.like(payload, q.scale.to(payload.device))


def _channels_elsewhere(q: QTensor, dims: int) -> bool:
    """Whether scales per channel run along another dimension than a pool's channels: that of an input without batch."""
    return q.scale.dim() > 0 and q.dim() != dims + 2


def _max_pool(dims: int, func: Any, args: Any, kwargs: Any) -> Any:
    call = _named("input kernel_size stride padding dilation ceil_mode return_indices", args, kwargs)
    q = call.pop("input")
    if call.pop("return_indices", False) or _channels_elsewhere(q, dims):
        return NotImplemented
    call["stride"] = call.get("stride") or None
    if q.payload.is_floating_point():
        return q.like(_MAX_POOLS[dims - 1](q.payload, **call))
    return q.like(reference.max_pool(q.payload, dims=dims, **call))


def _adaptive_max_pool(dims: int, func: Any, args: Any, kwargs: Any) -> Any:
    call = _named("input output_size return_indices", args, kwargs)
    q, size = call["input"], call["output_size"]
    if call.get("return_indices", False) or _channels_elsewhere(q, dims):
        return NotImplemented
    if q.payload.is_floating_point():
        return q.like(_ADAPTIVE_MAX_POOLS[dims - 1](q.payload, size))
    return q.like(reference.adaptive_max_pool(q.payload, size, dims=dims))


def interpolates_integers(
    mode: str = "nearest", recompute_scale_factor: bool | None = None, antialias: bool = False, **_: Any
) -> bool:
    """Whether there is a rule for `torch.nn.functional.interpolate` with these arguments."""
    return mode in ("nearest", "nearest-exact", "linear", "bilinear") and not recompute_scale_factor and not antialias


INTERPOLATE = "input size scale_factor mode align_corners recompute_scale_factor antialias"
"""Its arguments, in order."""


def _interpolate(func: Any, args: Any, kwargs: Any) -> Any:
    call = _named(INTERPOLATE, args, kwargs)
    q, mode = call.pop("input"), call.get("mode", "nearest")
    if not interpolates_integers(**call):
        return NotImplemented
    payload, target = q.payload, (call.get("size"), call.get("scale_factor"))
    if "linear" in mode:
        corners = bool(call.get("align_corners"))
        y = reference.upsample_linear(q.int_repr(), *target, align_corners=corners)
        if not payload.is_floating_point():
            return q.like(y)
        smooth = F.interpolate(payload, **call)
        return q.like(
            y.to(payload.dtype) + (smooth - smooth.detach())
        )  # the integers, with the gradient of what is rounded
    if payload.is_floating_point():
        return q.like(F.interpolate(payload, **call))
    return q.like(reference.upsample_nearest(payload, *target, exact=mode == "nearest-exact"))


def _pad(func: Any, args: Any, kwargs: Any) -> Any:
    call = _named("input pad mode value", args, kwargs)
    q, pad, mode = call["input"], list(call["pad"]), call.get("mode", "constant")
    if q.scale.dim() > 0 and any(pad[2 * (q.dim() - 2) :]):
        return NotImplemented
    if mode == "constant":
        return NotImplemented if call.get("value") else q.like(F.pad(q.payload, pad))
    if q.payload.is_floating_point():
        return q.like(F.pad(q.payload, pad, mode=mode))
    return q.like(reference.pad(q.payload, pad, mode))


def _relu(func: Any, args: Any, kwargs: Any) -> Any:
    call = _named("input inplace", args, kwargs)
    q = call["input"]
    if call.get("inplace", False) or func.__name__ == "relu_":
        q.payload.clamp_(min=0)
        return q
    return q.like(q.payload.clamp(min=0))


def _dropout(func: Any, args: Any, kwargs: Any) -> Any:
    """What is left is divided by 1 - p: the scale is, so that the integers stay integers."""
    call = _named("input p training inplace", args, kwargs)
    q, p = call["input"], call.get("p", 0.5)
    if not call.get("training", True) or p == 0:
        return q
    if p == 1 or not q.payload.is_floating_point():
        return NotImplemented
    kept = func(torch.ones_like(q.payload), p, True) * (1 - p)
    return q.like(q.payload * kept.round(), q.scale / (1 - p))


def _join(func: Any, args: Any, kwargs: Any) -> Any:
    """Operands of one scale are copied; others go through a cat with an output scale of its own, or run in float."""
    tensors = args[0] if args else kwargs["tensors"]
    if not all(isinstance(t, QTensor) for t in tensors) or isinstance(kwargs.get("out"), Tensor):
        return NotImplemented
    first = tensors[0]
    if first.scale.dim() > 0 or not all(t.scale is first.scale and t.dtype8 == first.dtype8 for t in tensors):
        return NotImplemented
    return first.like(
        func([t.payload for t in tensors], *args[1:], **{k: v for k, v in kwargs.items() if k != "tensors"})
    )


def _everywhere(names: str) -> list[Any]:
    """Functions of these names, as functions and as methods, where they exist."""
    return [getattr(owner, name) for name in names.split() for owner in (torch, torch.Tensor) if hasattr(owner, name)]


_T = torch.Tensor
_MAX_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_ADAPTIVE_MAX_POOLS = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
_QUERIES: set[Any] = {
    *_everywhere("size dim numel stride is_contiguous element_size storage_offset nelement data_ptr get_device ndimension is_complex is_signed"),
    *_everywhere("is_conj is_neg is_inference is_same_size is_shared is_pinned is_set_to"),
    _T.__len__, _T.untyped_storage, _T.register_hook, _T.retain_grad, _T.__hash__, _T.as_subclass, _T.requires_grad_, _T.backward,
    torch.autograd.backward,  # reentrant checkpointing
}  # fmt: skip
MOVES = (
    "view reshape flatten unflatten permute transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze expand expand_as view_as "
    "reshape_as broadcast_to chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind select narrow index_select gather "
    "take_along_dim diagonal unfold repeat repeat_interleave tile roll flip fliplr flipud rot90 t adjoint ravel atleast_1d atleast_2d "
    "atleast_3d __getitem__"
)
"""Functions and methods, by name, that move data and compute nothing."""
KEEPS = "contiguous clone detach positive resolve_conj resolve_neg"
"""Likewise, and every element stays where it is."""
RULES: dict[Any, Rule] = {
    **dict.fromkeys(_everywhere(MOVES), _move),
    **dict.fromkeys(
        [torch.pixel_shuffle, torch.pixel_unshuffle, torch.channel_shuffle, torch.native_channel_shuffle],
        _move_as_float,
    ),
    **dict.fromkeys([*_everywhere(KEEPS), _T.__pos__], _keep),
    _T.__iter__: _iterate,
    **dict.fromkeys([_T.to, _T.cpu, _T.cuda], _to),
    **{getattr(owner, f"max_pool{d}d"): partial(_max_pool, d) for owner in (torch, F) for d in (1, 2, 3)},
    **{pool: partial(_adaptive_max_pool, d) for d, pool in enumerate(_ADAPTIVE_MAX_POOLS, start=1)},
    **dict.fromkeys([F.relu, torch.relu, torch.relu_, _T.relu, _T.relu_], _relu),
    **dict.fromkeys([F.dropout, F.dropout1d, F.dropout2d, F.dropout3d], _dropout),
    **dict.fromkeys(
        [torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack, torch.dstack], _join
    ),
    F.interpolate: _interpolate,
    F.pad: _pad,
}
