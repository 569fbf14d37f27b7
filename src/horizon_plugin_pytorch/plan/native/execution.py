"""A native program and what a call of it needs: an arena, slots, and PyTorch for the steps in between."""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from horizon_plugin_pytorch.backends.cpu import library
from horizon_plugin_pytorch.backends.cpu.memory import Memory
from horizon_plugin_pytorch.nn.quantized.qtensor import QTensor
from horizon_plugin_pytorch.plan.native import tuning
from horizon_plugin_pytorch.plan.native.bands import Bands
from horizon_plugin_pytorch.plan.native.batches import Split, separable
from horizon_plugin_pytorch.plan.native.constants import Constants
from horizon_plugin_pytorch.plan.native.layout import View
from horizon_plugin_pytorch.plan.native.lowering import Depth, InTorch, Lowering, TorchStep
from horizon_plugin_pytorch.plan.native.shapes import infer
from horizon_plugin_pytorch.plan.native.tuning import Tuner
from horizon_plugin_pytorch.plan.program import Plan, PlanError
from horizon_plugin_pytorch.plan.steps import INTEGER_DTYPES, fill, run_step

_MOST_IDLE_STATES = 4


class _State:
    """What one call at a time may use: an arena, and operations that write to this state's flag for NaN."""

    def __init__(self, program: NativeProgram, threads: int) -> None:
        arenas = threads if program.split.apart else 1
        self.threads = threads
        self.arena = program.memory(arenas, threads)
        self.own = self.arena.data_ptr() + arenas * program.arena_bytes
        self.bad = ctypes.c_int32(0)
        self.kept: list[Any] = []
        lowered = program.lowered
        operations = lowered.builder.operations
        array = (library.Op * max(len(operations), 1))()
        for i, operation in enumerate(operations):
            params = operation.params
            if i in lowered.quantizes:
                params = type(params).from_buffer_copy(params)
                params.bad = ctypes.addressof(self.bad)
                self.kept.append(params)
            array[i] = library.Op(library.KINDS[operation.kind], int(operation.barrier), ctypes.addressof(params))
        self.kept.append(array)
        self.segments: list[TorchStep | library.Program] = []
        begin = 0
        for step in [*lowered.torch_steps, None]:
            end = len(operations) if step is None else step.position
            if end > begin:
                first = ctypes.cast(ctypes.addressof(array[begin]), ctypes.POINTER(library.Op))
                self.segments.append(
                    library.Program(
                        first, end - begin, program.iterations, ctypes.addressof(program.slot_step), program.slots,
                        int(program.split.apart), program.arena_bytes, program.own_bytes,
                    )
                )  # fmt: skip
            if step is not None:
                self.segments.append(step)
            begin = end


class NativeProgram:
    """A plan for inputs of one shape and layout; may be called by several threads at a time.

    Args:
        tuner: chooses how convolutions are done; None: without measurements.
        split: run the plan on so many images at a time, see `batches`; None: on all.
        threads: how many there will be, for which work is cut evenly.
        depth: which chains of convolutions run depth first.

    Raises:
        PlanError: the plan does not accept these inputs, or cannot be run on a part of the batch.
    """

    def __init__(
        self,
        plan: Plan,
        constants: Constants,
        inputs: Sequence[Tensor],
        isa: int,
        tuner: Tuner | None = None,
        split: Split | None = None,
        threads: int = 1,
        depth: Depth = (),
    ) -> None:
        self.plan, self.isa = plan, isa
        self.images = inputs[0].shape[0] if inputs and inputs[0].dim() else 1
        self.split = split or Split(self.images, False)
        self.iterations = max(self.images // max(self.split.images, 1), 1)
        whole, inputs = inputs, [x[: self.split.images] for x in inputs] if self.iterations > 1 else inputs
        metas = infer(plan, [(tuple(x.shape), x.dtype) for x in inputs])
        if self.iterations > 1 and not separable(plan, metas, self.split.images):
            raise PlanError(f"{plan.model} does not compute each image of a batch by itself")
        threads = 1 if self.split.apart else threads
        self.lowered = Lowering(plan, constants, metas, inputs, isa, threads, depth).run()
        if self.iterations > 1 and any(step.index not in self.lowered.tail for step in self.lowered.torch_steps):
            raise PlanError(f"{plan.model} runs steps in PyTorch between others, so it runs on whole batches")
        self.arena_bytes = self.lowered.arena_bytes
        self.own_bytes = self.lowered.own_bytes + library.SLACK if self.lowered.own_bytes else 0
        self.slots = len(self.lowered.slots) + 2
        steps = [0, *(v.strides[0] * self.split.images if self.iterations > 1 else 0 for v in self.lowered.slots), 0]
        self.slot_step = (ctypes.c_int64 * self.slots)(*steps)
        in_torch = {step.imported.buffer.slot for step in self.lowered.torch_steps if step.imported is not None}
        self._made = [
            None if v.buffer.slot in in_torch else (self._of_all_images(v), tuple(s // v.item for s in v.strides))
            for v in self.lowered.slots[len(inputs) :]
        ]  # shapes and strides of floats that the kernels make
        self._states: deque[_State] = deque()
        for operation in self.lowered.builder.operations:
            for part in operation.parts():
                if part.kind == "conv":
                    tuning.apply(part, tuning.usual(part.params))
            if isinstance(operation, Bands):
                operation.assemble()
        if tuner is not None:
            self.tune(tuner, whole)

    def tune(self, tuner: Tuner, inputs: Sequence[Tensor]) -> None:
        """Choose how convolutions are done; not while the program runs."""
        self._states.clear()
        arena = self.memory(1, 1).random_(0, 256)
        tensors = self._tensors(arena, inputs)
        tuner.tune(self.lowered.builder.operations, self._pointers(tensors, arena.data_ptr() + self.arena_bytes))

    def memory(self, arenas: int, threads: int) -> Tensor:
        """Uninitialized bytes: arenas, and then what each thread has of its own."""
        return Memory().empty(arenas * self.arena_bytes + threads * self.own_bytes + library.SLACK)

    def _of_all_images(self, view: View) -> tuple[int, ...]:
        return (self.images, *view.shape[1:]) if self.iterations > 1 else view.shape

    def _tensors(self, arena: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The tensors of all slots; None for those that PyTorch makes on the way."""
        made = [None if like is None else torch.empty_strided(*like, dtype=torch.float32) for like in self._made]
        return [arena, *inputs, *made]

    def _pointers(self, tensors: Sequence[Tensor | None], own: int) -> Any:
        return (ctypes.c_void_p * self.slots)(*(None if t is None else t.data_ptr() for t in tensors), own)

    @property
    def steps_in_torch(self) -> list[int]:
        return [step.index for step in self.lowered.torch_steps]

    @property
    def chains(self) -> int:
        """How many chains of convolutions run depth first."""
        return sum(isinstance(operation, Bands) for operation in self.lowered.builder.operations)

    def __call__(self, inputs: Sequence[Tensor], threads: int) -> Any:
        return self._with_state(inputs, threads, None)

    def profile(self, inputs: Sequence[Tensor], threads: int) -> list[float]:
        """Run once, with a wait behind each operation; the seconds that each of the plan's steps took.

        Those of steps that run together are the last one's. Threads share each operation, also where they otherwise would not.
        """
        seconds = [0.0] * len(self.plan.steps)
        self._with_state(inputs, threads, seconds)
        return seconds

    def _with_state(self, inputs: Sequence[Tensor], threads: int, seconds: list[float] | None) -> Any:
        try:
            state = self._states.pop()
            if state.threads != threads:
                state = _State(self, threads)
        except IndexError:
            state = _State(self, threads)
        try:
            return self._run(state, inputs, threads, seconds)
        finally:
            if len(self._states) < _MOST_IDLE_STATES:
                self._states.append(state)

    def _run(self, state: _State, inputs: Sequence[Tensor], threads: int, seconds: list[float] | None) -> Any:
        tensors = self._tensors(state.arena, inputs)
        pointers = self._pointers(tensors, state.own)
        values: dict[int, Any] = {}

        def value(index: int) -> Any:
            return self._value(self.lowered.values[index], values, tensors, state)

        done = 0  # operations
        for segment in state.segments:
            if isinstance(segment, library.Program):
                if seconds is None:
                    self._native(segment, pointers, threads, state, None)
                    continue
                taken = (ctypes.c_double * segment.count)()
                self._native(segment, pointers, threads, state, taken)
                for operation, each in zip(self.lowered.builder.operations[done:], taken, strict=False):
                    seconds[operation.step] += each
                done += segment.count
            else:
                start = time.perf_counter()
                self._in_torch(segment, value, values, tensors, pointers, state)
                if seconds is not None:
                    seconds[segment.index] = time.perf_counter() - start
        return fill(self.plan.outputs, lambda n: self._detached(value(n), state), self.plan.constants)

    def _native(self, program: library.Program, pointers: Any, threads: int, state: _State, seconds: Any) -> None:
        """`seconds`: None, or an array for what each operation takes."""
        state.bad.value = 0
        arguments = (ctypes.byref(program), pointers, threads, self.isa)
        code = library.load().hz_run(*arguments) if seconds is None else library.load().hz_profile(*arguments, seconds)
        if code:
            raise PlanError(f"the CPU kernels refused the program with code {code}")
        if state.bad.value:
            raise PlanError(f"an input of {self.plan.model} holds NaN, which has no integer")

    def _in_torch(
        self,
        step: TorchStep,
        value: Any,
        values: dict[int, Any],
        tensors: list[Tensor | None],
        pointers: Any,
        state: _State,
    ) -> None:
        what = self.plan.steps[step.index]
        copies: list[tuple[Tensor, Tensor]] = []

        def contiguous(x: Any) -> Any:
            result = _contiguous(x)
            if isinstance(x, Tensor) and not isinstance(x, QTensor) and result is not x:
                copies.append((x, result))
            return result

        try:
            result = run_step(what, lambda n: tree_map(contiguous, value(n)), self.plan.constants)
        except Exception as error:
            raise PlanError(f"step {step.index} ({what.name!r}, {what.target or what.kind}): {error}") from error
        for original, copy in copies:  # a function in place changed the copy
            if result is copy:
                original.copy_(copy)
        result = tree_map(lambda leaf: self._detached(leaf, state), result)
        values[step.index] = result
        view = step.imported
        if view is None:
            return
        if view.buffer.slot:
            tensors[view.buffer.slot] = result.contiguous()
            pointers[view.buffer.slot] = tensors[view.buffer.slot].data_ptr()  # type: ignore[union-attr]
        else:
            _tensor(view, state.arena).copy_(result.payload)

    def _value(self, value: Any, values: dict[int, Any], tensors: list[Tensor | None], state: _State) -> Any:
        """A value of the plan as the functions of PyTorch take it."""
        if isinstance(value, InTorch):
            return values[value.index]
        if isinstance(value, View):
            if value.buffer.slot:
                return tensors[value.buffer.slot]
            assert value.scale is not None
            return QTensor.make(_tensor(value, state.arena), value.scale, INTEGER_DTYPES[value.dtype])
        if isinstance(value, (tuple, list)):
            return type(value)(self._value(v, values, tensors, state) for v in value)
        return value

    @staticmethod
    def _detached(value: Any, state: _State) -> Any:
        """A copy of what lies in the arena, which the next call overwrites."""
        if isinstance(value, (tuple, list)):
            return type(value)(NativeProgram._detached(v, state) for v in value)
        if not isinstance(value, Tensor):
            return value
        plain = value.payload if isinstance(value, QTensor) else value
        if plain.untyped_storage().data_ptr() != state.arena.untyped_storage().data_ptr():
            return value
        return value.like(plain.clone()) if isinstance(value, QTensor) else plain.clone()


def _contiguous(value: Any) -> Any:
    """What PyTorch computes in float depends on the layout in its last bits; it gets the one that the reference has."""
    if not isinstance(value, Tensor) or value.is_contiguous():
        return value
    return value.like(value.payload.contiguous()) if isinstance(value, QTensor) else value.contiguous()


def _tensor(view: View, arena: Tensor) -> Tensor:
    """A view of the arena as a tensor of integers."""
    start = view.buffer.offset + view.offset
    return arena.view(INTEGER_DTYPES[view.dtype]).as_strided(view.shape, view.strides, start)
