"""Checkpoint keys of modules that moved into a group, and batch norms absorbed while a checkpoint is loaded.

Fusing moves modules inside the tree, but their keys in a ``state_dict`` stay where the user's model had them: the module that
stands at the old place (the *owner* of the keys) saves and loads in the name of the one that left (the *guest*). So a checkpoint
saved before fusion loads after it, and while BN is kept also the other way round, with missing and unexpected keys reported as
ever.

A batch norm that was absorbed has no keys any more. If a checkpoint from before the fusion brings them, the anchor's weight in
that checkpoint is the raw one, and the norm is absorbed once both have arrived, in whichever order modules are visited.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from horizon_plugin_pytorch.fusion.absorb_bn import absorb_into, fold, norm_tensors
from horizon_plugin_pytorch.fusion.patterns import Anchor, is_frozen_batch_norm

StateDict = dict[str, Any]


class GuestKeys:
    """Saves and loads the tensors of `guest` under the keys of the modules it is attached to.

    Args:
        guest: the module that holds the tensors.
        names: for each tensor name of the guest, its name at the owner; the same where not listed.
    """

    def __init__(self, guest: nn.Module, names: dict[str, str] | None = None) -> None:
        self._guest: nn.Module | None = guest
        self._place: tuple[nn.Module, str] | None = None
        self.names = names or {}
        self._keep_vars = False

    @property
    def guest(self) -> nn.Module | None:
        return self._guest if self._place is None else self._place[0]._modules.get(self._place[1])

    def follow(self, group: nn.Module, child: str) -> GuestKeys:
        """From now on the guest is whatever stands at `child` (``convert_sync_batchnorm`` and others replace modules)."""
        self._place = group, child
        return self

    def attach(self, owner: nn.Module) -> None:
        owner.register_state_dict_pre_hook(self.begin_save)
        owner._register_state_dict_hook(self.save)
        owner._register_load_state_dict_pre_hook(self.load)  # the public form ties the hook to this object

    def key(self, prefix: str, name: str) -> str:
        return prefix + self.names.get(name, name)

    def begin_save(self, owner: nn.Module, prefix: str, keep_vars: bool) -> None:
        self._keep_vars = keep_vars  # the hook that saves is not told

    def save(self, owner: nn.Module, destination: StateDict, prefix: str, metadata: Any) -> None:
        if self.guest is None:
            return
        for name, tensor in self.guest.state_dict(keep_vars=self._keep_vars).items():
            destination[self.key(prefix, name)] = tensor

    def load(
        self,
        state_dict: StateDict,
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        if self.guest is None:
            return
        names = list(self.guest.state_dict(keep_vars=True))
        found = {prefix + n: state_dict.pop(self.key(prefix, n)) for n in names if self.key(prefix, n) in state_dict}
        before = len(missing)
        self.guest._load_from_state_dict(found, prefix, metadata, strict, missing, unexpected, errors)
        missing[before:] = [self.key(prefix, m.removeprefix(prefix)) for m in missing[before:]]


class NormKeys(GuestKeys):
    """The keys of a batch norm beside an anchor, kept in the group or absorbed."""

    def __init__(self, row: Anchor, anchor: nn.Module, norm: nn.Module, names: dict[str, str] | None = None) -> None:
        super().__init__(norm, names)
        self.row, self.anchor = row, anchor
        self.eps: float = norm.eps  # type: ignore[assignment]
        self.required = [name for name, tensor in norm_tensors(norm).items() if tensor is not None]
        counter = "num_batches_tracked"  # not in old checkpoints; in a frozen norm's when they come from a stock one
        self.optional = [counter] if norm._buffers.get(counter) is not None or is_frozen_batch_norm(norm) else []
        if not self.optional:
            norm._register_load_state_dict_pre_hook(_no_counter)
        self.had_bias = anchor.bias is not None
        # One call of load_state_dict is known by the list it collects missing keys in.
        self._session: list[str] | None = None
        self._anchor_arrived: tuple[str, Tensor, Tensor | None] | None = None
        self._norm_arrived: dict[str, Tensor | None] | None = None

    def absorb(self) -> None:
        """Absorb the norm into the anchor; from now on its keys are read only to absorb them again."""
        assert self.guest is not None
        absorb_into(self.row, self.anchor, norm_tensors(self.guest), self.eps)
        self._guest = self._place = None
        self.anchor.register_load_state_dict_pre_hook(self.anchor_arrives)

    def _enter(self, missing: list[str]) -> None:
        if self._session is not missing:
            self._session, self._anchor_arrived, self._norm_arrived = missing, None, None

    def _leave(self) -> None:
        self._session = self._anchor_arrived = self._norm_arrived = None

    def _fits(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether loading as usual will take these; otherwise it says what is wrong with them, and nothing is absorbed."""
        shapes = (self.anchor.weight.shape, self.anchor.bias.shape if self.had_bias else None)
        return (weight.shape, None if bias is None else bias.shape) == shapes

    def load(
        self,
        state_dict: StateDict,
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        if self.guest is not None:
            return super().load(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        found = {n: state_dict.pop(self.key(prefix, n), None) for n in (*self.required, *self.optional)}
        if all(tensor is None for tensor in found.values()):
            return None  # saved after the norm was absorbed
        absent = [self.key(prefix, n) for n in self.required if found[n] is None]
        if absent:
            errors.append(
                f"a batch norm of {type(self.anchor).__name__} cannot be absorbed on load without {', '.join(absent)}"
            )
            return None
        channels = self.row.out_channels(self.anchor)
        for name in self.required:
            if found[name].shape != (channels,):
                errors.append(
                    f"size mismatch for {self.key(prefix, name)}: {tuple(found[name].shape)}, expected ({channels},)"
                )
                return None
        self._enter(missing)
        if self._anchor_arrived is None:
            self._norm_arrived = found
            return None
        bias_key, weight, bias = self._anchor_arrived
        self._leave()
        if not self.had_bias:
            missing.remove(bias_key) if bias is None else unexpected.append(bias_key)
        if self._fits(weight, bias):
            assign = bool(metadata.get("assign_to_params_buffers"))
            absorb_into(self.row, self.anchor, found, self.eps, raw=(weight, bias), in_place=not assign)
        return None

    def anchor_arrives(
        self,
        anchor: nn.Module,
        state_dict: StateDict,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        weight, bias = state_dict.get(prefix + "weight"), state_dict.get(prefix + "bias")
        if weight is None or weight is anchor.weight:
            return  # missing, or a group handing its child what it already has
        self._enter(missing)
        if self._norm_arrived is None:
            # Without a bias it is right only if the norm's keys still come; `load` then takes the complaint back.
            self._anchor_arrived = (prefix + "bias", weight, bias)
            return
        if bias is not None and not self.had_bias:
            unexpected.append(prefix + "bias")
        if self._fits(weight, bias):
            values = fold(self.row, self.row.groups(anchor), weight, bias, self._norm_arrived, self.eps)
            assign = metadata.get("assign_to_params_buffers")  # otherwise rounded once, to the model's dtype
            for name, value in zip(("weight", "bias"), values, strict=True):
                state_dict[prefix + name] = value.to(weight.dtype) if assign else value
        self._leave()


def _no_counter(state_dict: StateDict, prefix: str, *_: Any) -> None:
    """A stock batch norm adds the counter that old checkpoints lack; one that never had it then calls it unexpected."""
    state_dict.pop(f"{prefix}num_batches_tracked", None)
