"""Running a plan: on the reference, or with the kernels of a backend."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from horizon_plugin_pytorch.plan.program import Plan, PlanError, refs
from horizon_plugin_pytorch.plan.steps import fill, run_step

BACKENDS = ("reference", "cpu")
_KEPT_SHAPES = 8


class Runner:
    """A plan, callable like the model it was recorded from; made by `Plan.compile`.

    Inputs are those of the model, of any batch and image size the model accepts. Calls from several threads do not disturb each
    other: all state is local to the call, but for the constants, which are only read.

    The kernels run in forked processes, too. A step that runs in PyTorch may hang there with more than one thread, as all of PyTorch's
    parallel operators do once the parent has used them: compile with ``threads=1``, or start processes by spawning. A pickled runner is its
    plan and how it was compiled; what is packed and measured is made again where it is loaded.

    Attributes:
        backend: ``cpu``: native kernels for tensors on the CPU. ``reference``: PyTorch, on any device (constants follow).
        report: why that backend, the devices whose inputs it could not take, and for each input shape so far the steps that run in PyTorch.
    """

    def __init__(self, plan: Plan, backend: str = "auto", threads: int | None = None) -> None:
        if backend not in (*BACKENDS, "auto"):
            raise PlanError(f"backend {backend!r} is not available; there are: {', '.join((*BACKENDS, 'auto'))}")
        if threads is not None and threads < 1:
            raise PlanError(f"threads must be at least 1, not {threads}")
        self.plan, self.threads = plan, threads
        self._asked = backend
        self._native: _Native | None = None
        self.backend, why = "reference", "as asked"
        if backend in ("auto", "cpu"):
            from horizon_plugin_pytorch.backends.cpu import library

            reason = library.why_not()
            if reason is None:
                self.backend, why = "cpu", "as asked" if backend == "cpu" else "the CPU kernels are there"
                self._native = _Native(plan)
                why += f" ({library.ISAS[self._native.isa]})"
            elif backend == "cpu":
                raise PlanError(f"backend 'cpu' is not available: {reason}")
            else:
                why = reason
        self._why = why
        self._elsewhere: set[str] = set()
        self._constants: dict[torch.device, dict[str, Tensor]] = {}
        self._last_use = _last_uses(plan)

    def __reduce__(self) -> tuple[Any, ...]:
        return Runner, (self.plan, self._asked, self.threads)

    @property
    def report(self) -> str:
        lines = [f"backend {self.backend}: {self._why}"]
        lines += [f"inputs on {d}: the reference, the kernels run on the CPU" for d in sorted(self._elsewhere)]
        if self._native is not None:
            lines += self._native.report
        return "\n".join(lines)

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Tensors in and out as the model's.

        Raises:
            PlanError: a missing or unexpected argument, another dtype or number of dimensions than recorded, a size that the model
                does not accept, NaN in what is quantized, tensors on several devices or on one that the backend cannot use.
        """
        if self._native is not None and not named:
            threads = self.threads or torch.get_num_threads()
            program = self._native.of_last_call(inputs, threads)
            if program is not None:
                return program([x.detach() for x in inputs], threads)
        values = self._bind(inputs, named)
        devices = {v.device for v in values}
        if len(devices) > 1:
            raise PlanError(f"the inputs are on several devices: {', '.join(sorted(map(str, devices)))}")
        device = next(iter(devices)) if devices else torch.device("cpu")
        native = self.native_for(device)
        with torch.no_grad(), _threads(self.threads):
            if native is not None:
                return native.run(values, self.threads or torch.get_num_threads())
            return self._reference(values, device)

    def native_for(self, device: torch.device) -> _Native | None:
        """The kernels, if they run tensors on `device`; None for the reference."""
        if self._native is None or device.type == "cpu":
            return self._native
        if self._asked != "auto":
            raise PlanError(
                f"backend 'cpu' runs tensors on the CPU; the inputs are on {device}: compile with 'reference'"
            )
        self._elsewhere.add(str(device))
        return None

    def _reference(self, values: list[Any], device: torch.device) -> Any:
        constants = self._on(device)
        for i, step in enumerate(self.plan.steps):
            try:
                values.append(run_step(step, values.__getitem__, constants))
            except Exception as error:
                raise PlanError(f"step {i} ({step.name!r}, {step.target or step.kind}): {error}") from error
            for gone in self._last_use.get(i, ()):
                values[gone] = None
        return fill(self.plan.outputs, values.__getitem__, constants)

    def _bind(self, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> list[Any]:
        names = self.plan.inputs
        arguments = dict(zip(names, inputs, strict=False)) | named
        if len(inputs) > len(names) or set(arguments) != set(names) or len(inputs) + len(named) != len(names):
            raise PlanError(
                f"{self.plan.model} takes {', '.join(names)}; got {len(inputs)} by position and {sorted(named)} by name"
            )
        values: list[Any] = []
        for name, value in zip(names, self.plan.values, strict=False):
            x = arguments[name]
            if not isinstance(x, Tensor) or _dtype_name(x.dtype) != value.dtype or x.dim() != len(value.shape):
                got = f"{_dtype_name(x.dtype)}, {x.dim()} dimensions" if isinstance(x, Tensor) else type(x).__name__
                raise PlanError(f"input {name!r} must be {value.dtype} with {len(value.shape)} dimensions, not {got}")
            values.append(x)
        return values

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._constants:
            self._constants[device] = {n: t.to(device) for n, t in self.plan.constants.items()}
        return self._constants[device]


class _Native:
    """The native programs of a plan, one per input shape and layout; the last few are kept."""

    def __init__(self, plan: Plan) -> None:
        from horizon_plugin_pytorch.backends.cpu import library
        from horizon_plugin_pytorch.plan.native.constants import Constants
        from horizon_plugin_pytorch.plan.native.tuning import Cache

        self.plan, self.isa = plan, library.best_isa()
        self.constants = Constants(plan)
        self.cache = Cache()
        self._programs: OrderedDict[Any, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._last: tuple[Any, Any] | None = None

    def of_last_call(self, inputs: tuple[Any, ...], threads: int) -> Any:
        """The program of the last call if it fits, else None. Most calls are like the one before them, and after other work has emptied
        the caches every look at an input costs: all the checks together a tenth of a small network's time.
        """
        last = self._last
        return last[1] if last is not None and last[0] == _likeness(inputs, threads) else None

    def run(self, inputs: list[Tensor], threads: int) -> Any:
        plain = [_plain_layout(x) for x in inputs]
        program = self.program(plain, threads)
        result = program(plain, threads)
        if not program.steps_in_torch and all(x.stride() == y.stride() for x, y in zip(inputs, plain, strict=True)):
            self._last = _likeness(inputs, threads), program
        return result

    def program(self, inputs: list[Tensor], threads: int) -> Any:
        from horizon_plugin_pytorch.plan.native.compiling import compile_for

        key = (*((tuple(x.shape), x.stride()) for x in inputs), threads)
        with self._lock:
            if key not in self._programs:
                # PyTorch's own parallel operators hang in a forked child; with one thread there are none.
                with _threads(1):
                    self._programs[key] = compile_for(self.plan, self.constants, inputs, self.isa, threads, self.cache)
                while len(self._programs) > _KEPT_SHAPES:
                    self._programs.popitem(last=False)
            self._programs.move_to_end(key)
            return self._programs[key]

    @property
    def report(self) -> list[str]:
        lines = [] if self.cache.note is None else [self.cache.note]
        with self._lock:
            programs = list(self._programs.items())
        for key, program in programs:
            shapes = ", ".join("×".join(map(str, shape)) for shape, _ in key[:-1])
            steps = [self.plan.steps[i] for i in program.steps_in_torch]
            in_torch = "; ".join(f"{s.name} ({s.target or s.kind})" for s in steps) or "none"
            parts = f"{program.split.images} images at a time{', one part per thread' if program.split.apart else ''}"
            lines.append(
                f"inputs {shapes}, {key[-1]} threads: {parts}, {program.chains} chains of convolutions depth first, "
                f"arena {program.arena_bytes / 1e6:.2f} MB, steps in PyTorch: {in_torch}"
            )
        return lines


def _likeness(inputs: Sequence[Any], threads: int) -> Any:
    """What the checks of a call, and the choice of a program, depend on."""
    return threads, [(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else None for x in inputs]


def _plain_layout(x: Tensor) -> Tensor:
    """`x` itself if it is contiguous or channels-last, otherwise a contiguous copy: each layout is a program."""
    x = x.detach()
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.is_contiguous() or (x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])):
        return x
    return x.contiguous()


def _last_uses(plan: Plan) -> dict[int, list[int]]:
    """For each step, the values that nobody reads after it."""
    last: dict[int, int] = {}
    for i, step in enumerate(plan.steps):
        last[len(plan.inputs) + i] = i
        for ref in refs((step.args, step.kwargs, step.params)):
            last[ref.value] = i
    kept = {ref.value for ref in refs(plan.outputs)}
    gone: dict[int, list[int]] = {}
    for value, step_index in last.items():
        if value not in kept:
            gone.setdefault(step_index, []).append(value)
    return gone


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)
