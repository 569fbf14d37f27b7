"""What in a network may legally be fused, found by running it: an oracle for the matcher that reads graphs.

The network runs once, unfused, in eval mode, under a ``TorchFunctionMode``. Every tensor that a function returns is a
*value*: it knows the call that made it and every call that read it. An in-place function makes a new value of the same
tensor. Reading a shape, a dtype or a device is not reading the value. From this follows, with no graph and no tracing:

* a *pair* is a norm call whose input an anchor (convolution, transposed convolution, linear) made; it is legal to
  absorb when nothing else reads that value, anchor and norm run exactly once, share no weight with another module, are
  free of hooks, and the norm uses running statistics. An anchor and a norm that run several times, but always together,
  may be absorbed or refused: which of the two depends on whether the caller that repeats them is seen;
* an *addition* can be fused when one operand was made by such an anchor, or by the norm of a legal pair, nobody else
  reads it or its shape (the anchor then runs where the addition stood), and both operands have the result's shape and
  dtype, unscaled;
* an *activation* (ReLU, ReLU6) can be fused when it is the only reader of such an anchor, norm or addition.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch.nn.modules import module as nn_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from models.zoo import flatten

ANCHOR_CALLS: dict[Any, int] = {  # function → spatial dimensions
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
    torch.conv_transpose1d: 1,
    torch.conv_transpose2d: 2,
    torch.conv_transpose3d: 3,
    F.linear: 0,
}
STOCK_ANCHORS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
ADD_NAMES = {"add", "add_", "__add__", "__radd__", "__iadd__"}
DROPOUT_NAMES = {"dropout", "dropout1d", "dropout2d", "dropout3d", "dropout_", "alpha_dropout", "feature_dropout"}
SHAPE = {"shape", "size", "numel", "nelement", "__len__", "dim", "ndim"}
METADATA = SHAPE | {
    *("dtype", "device", "layout", "requires_grad", "is_cuda", "is_cpu", "is_leaf", "is_quantized"),
    *("stride", "element_size", "is_contiguous", "is_floating_point"),
}


@dataclass(eq=False)
class Call:
    """One call of the kinds that take part in a group; ``module`` is the dotted name of the module it belongs to."""

    kind: str  # "anchor", "norm", "add", "activation" or "other"
    module: str
    function: str
    inputs: list[Value] = field(default_factory=list)
    output: Value | None = None
    order: int = 0  # among the calls of the forward
    refused: str | None = None  # why this call, whatever its neighbours, is not one to fuse


@dataclass(eq=False)
class Value:
    """One tensor between two writes."""

    maker: Call | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    readers: list[Call] = field(default_factory=list)
    shape_read: bool = False


@dataclass(frozen=True)
class Pair:
    """A norm that reads what an anchor made, ``calls`` times. ``reason`` is None where absorbing it is legal;
    ``together`` says that the reason is only that both run several times, always one after the other."""

    anchor: str
    norm: str
    calls: int
    reason: str | None
    together: bool


@dataclass(frozen=True)
class Trace:
    """What one forward showed."""

    pairs: list[Pair]
    norm_calls: int
    # Per call: the anchor of the group it can be fused into, or None; and why not.
    adds: list[tuple[str | None, str | None]]
    activations: list[tuple[str | None, str | None]]

    @property
    def legal(self) -> set[tuple[str, str]]:
        """The (anchor, norm) names of the pairs that are legal to absorb."""
        return {(p.anchor, p.norm) for p in self.pairs if p.reason is None}

    @property
    def fusable_adds(self) -> int:
        """Groups that can have an addition: one whose anchor runs several times is one group."""
        return len({anchor for anchor, _ in self.adds if anchor is not None})

    @property
    def fusable_activations(self) -> int:
        """Groups that can have an activation."""
        return len({anchor for anchor, _ in self.activations if anchor is not None})


@torch.no_grad()
def trace(model: nn.Module, inputs: tuple[Any, ...]) -> Trace:
    """Runs ``model(*inputs)`` once and says which of its calls can be fused."""
    recorder = _Recorder(model)
    with recorder.watching_modules(), recorder:
        output = model(*inputs)
    end = Call("other", "", "output")
    for tensor in flatten(output):
        recorder.value(tensor).readers.append(end)
    return _judge(recorder.calls)


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.names: dict[int, str] = {}
        self.modules: dict[str, nn.Module] = {}
        self.owners: dict[int, list[str]] = defaultdict(list)  # id of a parameter or buffer → modules that hold it
        for name, module in model.named_modules():
            self.names[id(module)] = name
            self.modules[name] = module
            for _, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                self.owners[id(tensor)].append(name)
        self.stack: list[str] = []
        self.frozen: list[tuple[nn.Module, Call]] = []  # the FrozenBatchNorm2d that is running, if any
        # id(tensor) → (that tensor, its version, its value); weak, or all activations of a deep network would stay.
        self.values: dict[int, tuple[weakref.ref[Tensor], int, Value]] = {}

    # -- modules -------------------------------------------------------------------------------------------------------

    def watching_modules(self) -> _Hooks:
        return _Hooks(self.enter, self.leave)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        from torchvision.ops.misc import FrozenBatchNorm2d

        name = self.names.get(id(module), type(module).__name__)
        self.stack.append(name)
        if isinstance(module, FrozenBatchNorm2d) and not self.frozen:
            # Its forward is plain arithmetic on its buffers: the module as a whole is the norm call.
            with DisableTorchFunction():
                self.frozen.append((module, self.start("norm", name, "FrozenBatchNorm2d", [args[0]])))

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.stack.pop()
        if self.frozen and self.frozen[-1][0] is module and isinstance(output, Tensor):
            with DisableTorchFunction():
                self.finish(self.frozen.pop()[1], output)

    # -- values --------------------------------------------------------------------------------------------------------

    def value(self, tensor: Tensor) -> Value:
        """The value a tensor holds now; a new one of unknown maker where a view of it was written to meanwhile."""
        known = self.values.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        return self.new_value(tensor, None)

    def new_value(self, tensor: Tensor, maker: Call | None) -> Value:
        value = Value(maker, tuple(tensor.shape), tensor.dtype)
        self.values[id(tensor)] = (weakref.ref(tensor), tensor._version, value)
        return value

    def start(self, kind: str, module: str, function: str, tensors: list[Tensor]) -> Call:
        call = Call(kind, module, function, order=len(self.calls))
        for tensor in tensors:
            call.inputs.append(self.value(tensor))
            call.inputs[-1].readers.append(call)
        self.calls.append(call)
        return call

    def finish(self, call: Call, output: Any) -> None:
        for tensor in flatten(output):
            value = self.new_value(tensor, call)
            call.output = call.output or value

    # -- functions -----------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        tensors = list(_tensors((args, kwargs)))
        if self.frozen or name in METADATA or not tensors:
            if name in SHAPE and not self.frozen and not isinstance(self.modules.get(self.here), _BatchNorm):
                self.value(tensors[0]).shape_read = True
            return func(*args, **kwargs)
        if name in DROPOUT_NAMES:
            output = func(*args, **kwargs)
            if output is tensors[0]:  # eval mode: hands the same tensor on
                return output
            self.finish(self.start("other", self.here, name, tensors), output)
            return output
        call = self.classify(func, name, args, kwargs, tensors)
        versions = [t._version for t in tensors]
        output = func(*args, **kwargs)
        for tensor, version in zip(tensors, versions, strict=True):
            if tensor._version != version:
                self.new_value(tensor, call)  # written in place
                call.output = self.value(tensor)
        for tensor in flatten(output):
            known = self.values.get(id(tensor))
            if not (known and known[0]() is tensor and known[2].maker is call):
                self.finish(call, tensor)
        return output

    @property
    def here(self) -> str:
        return self.stack[-1] if self.stack else ""

    def classify(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> Call:
        if func in ANCHOR_CALLS:
            return self.anchor(func, name, args, kwargs, tensors)
        if name == "batch_norm":
            return self.norm(func, name, args, kwargs)
        call = self.start("other", self.here, name, tensors)
        if name in ADD_NAMES:
            call.kind = "add"
            alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
            if len(tensors) != 2:
                call.refused = "an operand is not a tensor"
            elif alpha != 1:
                call.refused = f"alpha is {alpha}"
        elif _is_activation(name, args, kwargs):
            call.kind = "activation"
        return call

    def anchor(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> Call:
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        owners = self.owners.get(id(weight), [])
        call = self.start("anchor", owners[0] if owners else self.here, name, tensors)
        module = self.modules.get(call.module)
        if not owners:
            call.refused = f"the weight of {name} is computed, no module's own"
        elif len(owners) > 1:
            call.refused = f"modules {', '.join(owners)} share a weight"
        elif type(module) not in STOCK_ANCHORS or call.module != self.here:
            call.refused = f"{name} is called in {self.here}, a {type(self.modules.get(self.here)).__name__}"
        elif _hooked(module):
            call.refused = f"{call.module} has hooks"
        return call

    def norm(self, func: Any, name: str, args: Any, kwargs: Any) -> Call:
        order = ("input", "running_mean", "running_var", "weight", "bias", "training")
        if func is torch.batch_norm:
            order = ("input", "weight", "bias", "running_mean", "running_var", "training")
        given = dict(zip(order, args, strict=False)) | kwargs
        owners = self.owners.get(id(given["running_mean"]), [])
        call = self.start("norm", owners[0] if owners else self.here, name, [given["input"]])
        if given["running_mean"] is None or given.get("training"):
            call.refused = "it normalizes with the statistics of its batch"
        elif not owners:
            call.refused = "its running statistics are no module's own"
        elif _hooked(self.modules[call.module]):
            call.refused = f"{call.module} has hooks"
        return call

    # -- judgement -----------------------------------------------------------------------------------------------------


def _judge(calls: list[Call]) -> Trace:
    times = Counter((call.kind, call.module) for call in calls)
    pairs = _pairs(calls, times)
    fit = {(p.anchor, p.norm) for p in pairs if p.reason is None or p.together}

    roots: dict[Call, str] = {}  # call whose output ends a group so far, fit to be fused further → the group's anchor
    adds: list[tuple[str | None, str | None]] = []
    activations: list[tuple[str | None, str | None]] = []
    for call in calls:
        maker = call.inputs[0].maker if call.inputs else None
        if call.kind == "anchor" and call.refused is None:
            roots[call] = call.module
        elif call.kind == "norm" and maker is not None and (maker.module, call.module) in fit:
            roots[call] = maker.module
        elif call.kind == "add":
            operand, reason = (None, call.refused) if call.refused else _operand(call, roots)
            if operand is not None:
                roots[call] = roots[operand]
            adds.append((roots.get(call), reason))
        elif call.kind == "activation":
            reason = "its input ends no group" if maker not in roots else _other_readers(maker)
            activations.append((None if reason else roots[maker], reason))
    norm_calls = sum(call.kind == "norm" for call in calls)
    return Trace(pairs, norm_calls, *(_always(found, times) for found in (adds, activations)))


def _pairs(calls: list[Call], times: Counter[tuple[str, str]]) -> list[Pair]:
    """Every anchor and norm that meet, judged over all the times they do."""
    meetings: dict[tuple[str, str], list[str | None]] = defaultdict(list)
    for norm in calls:
        anchor = norm.inputs[0].maker if norm.kind == "norm" else None
        if anchor is not None and anchor.kind == "anchor":
            reason = _first(anchor.refused, _other_readers(anchor), norm.refused, _layout(anchor))
            meetings[anchor.module, norm.module].append(reason)
    pairs = []
    for (anchor_name, norm_name), reasons in meetings.items():
        reason = _first(*reasons)
        runs = {anchor_name: times["anchor", anchor_name], norm_name: times["norm", norm_name]}
        repeated = next((f"{name} runs {n} times" for name, n in runs.items() if n > 1), None)
        together = reason is None and repeated is not None and set(runs.values()) == {len(reasons)}
        pairs.append(Pair(anchor_name, norm_name, len(reasons), reason or repeated, together))
    return pairs


def _always(
    found: list[tuple[str | None, str | None]], times: Counter[tuple[str, str]]
) -> list[tuple[str | None, str | None]]:
    """Of an anchor that runs several times, a group has what every one of the calls has."""
    fused = Counter(anchor for anchor, _ in found)
    return [
        (None, f"{anchor} runs {times['anchor', anchor]} times, but not always so")
        if anchor is not None and fused[anchor] != times["anchor", anchor]
        else (anchor, reason)
        for anchor, reason in found
    ]


class _Hooks:
    """Global forward hooks for as long as the context lasts."""

    def __init__(self, enter: Callable[..., None], leave: Callable[..., None]) -> None:
        self.enter, self.leave = enter, leave

    def __enter__(self) -> None:
        self.handles = [
            nn_module.register_module_forward_pre_hook(self.enter),
            nn_module.register_module_forward_hook(self.leave, always_call=True),
        ]

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()


def _first(*reasons: str | None) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _other_readers(maker: Call) -> str | None:
    assert maker.output is not None
    readers = maker.output.readers
    if len(readers) == 1:
        return None
    return f"the output of {maker.module} is read {len(readers)} times: {', '.join(r.function for r in readers)}"


def _layout(anchor: Call) -> str | None:
    """A norm's channels are dim 1: a linear layer's features are there only where its output is a matrix."""
    assert anchor.output is not None
    if anchor.function == "linear" and len(anchor.output.shape) != 2:
        return f"{anchor.module} has its features last, the norm has its channels in dim 1"
    return None


def _operand(add: Call, roots: dict[Call, str]) -> tuple[Call | None, str | None]:
    """The call that made the operand whose group the addition can join (the later one, if both can); or why neither."""
    a, b = add.inputs
    if add.output is None or not a.shape == b.shape == add.output.shape:
        return None, f"the operands' shapes {a.shape} and {b.shape} differ"
    if not a.dtype == b.dtype == add.output.dtype:
        return None, f"the operands' dtypes {a.dtype} and {b.dtype} differ"
    makers = [v.maker for v in (a, b) if v.maker in roots and v.maker.kind in ("anchor", "norm")]
    reasons = [_not_movable(maker) for maker in makers]
    movable = [maker for maker, reason in zip(makers, reasons, strict=True) if reason is None]
    if movable:
        return max(movable, key=lambda maker: maker.order), None
    return None, _first("no operand is made by an anchor or an absorbed norm" if not makers else None, *reasons)


def _not_movable(maker: Call) -> str | None:
    """Why a group cannot run where the addition that reads it stands."""
    assert maker.output is not None
    anchor = maker if maker.kind == "anchor" else maker.inputs[0].maker
    if maker.output.shape_read or (anchor and anchor.output and anchor.output.shape_read):
        return f"the shape of {maker.module}'s output is read before the addition"
    return _other_readers(maker)


def _is_activation(name: str, args: Any, kwargs: Any) -> bool:
    if name in ("relu", "relu_", "relu6"):
        return True
    if name in ("hardtanh", "hardtanh_"):
        return (*args[1:3],) == (0, 6) or (kwargs.get("min_val"), kwargs.get("max_val")) == (0, 6)
    if name in ("clamp", "clamp_", "clip", "clip_"):
        low, high = [*args[1:3], kwargs.get("min"), kwargs.get("max")][:2] if len(args) != 2 else (args[1], None)
        return (kwargs.get("min", low), kwargs.get("max", high)) in ((0, 6), (0, None))
    return name in ("clamp_min", "clamp_min_") and [*args[1:2], kwargs.get("min")][0] == 0


def _hooked(module: nn.Module | None) -> bool:
    return module is not None and bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # a property of Tensor
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
