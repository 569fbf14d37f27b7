"""Fitting each operator to its float output on the inputs that it really gets: bias correction, least squares, weight rounding.

With x the float input of a group's linear operator, x̂ the one once everything before it is quantized, and r, r̂ likewise the other
operand of its add, all three methods lower the expected square of

    (W x + b + r) - (Ŵ x̂ + b̂ + r̂)

(the asymmetric reconstruction of Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", equation 25,
https://arxiv.org/abs/2004.10568). Operators are taken in the order of execution, so x̂ holds the changes made before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from horizon_plugin_pytorch.errors import QuantizationError
from horizon_plugin_pytorch.nn.qat.group import QATGroup
from horizon_plugin_pytorch.nn.quantized.qtensor import dequantize
from horizon_plugin_pytorch.quantization.improve import lockstep
from horizon_plugin_pytorch.quantization.improve.lockstep import Step
from horizon_plugin_pytorch.quantization.improve.matrices import (
    at_positions,
    columns,
    from_matrix,
    positions,
    weight_matrix,
)

POSITIONS = 20_000
"""About so many output positions of an operator are looked at, drawn at random, the same ones every time."""
LARGEST = 4608
"""Operators with more inputs per output (512 channels with a 3x3 kernel) only have their bias corrected: time grows with its cube."""

_FLOAT32 = 2.0**-20
_BLOCK = 64


def correct_bias(model: nn.Module, data: Iterable[Any], *, progress: bool = True) -> nn.Module:
    """Give each bias what quantization took from its channel's mean: ``b̂ = b + E[W x + r] - E[Ŵ x̂ + r̂]``.

    The empirical, sequential bias correction of Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", section 4.2 and appendix D, https://arxiv.org/abs/1906.04721. Operators without a bias, with a norm that was
    kept, or whose weight several operators share stay as they are.

    Args:
        model: prepared and calibrated; changed in place.
        data: as for `calibrate`; about 32 samples of it are used.
        progress: show a bar.

    Raises:
        QuantizationError: see `lockstep.run`; the model is then unchanged.
    """
    shared = _shared(model)

    def visit(step: Step) -> None:
        if _is_open(step.group, shared) and step.group.bias is not None:
            moments = _Moments(step, second=False)
            weight = weight_matrix(step.group)
            _shift_bias(step.group, moments, weight, _as_quantized(step.group, weight))

    lockstep.run(model, data, visit, progress=progress, title="correct_bias")
    return model


def reconstruct(
    model: nn.Module, data: Iterable[Any], *, ridge: float = 1.0, rounding: bool = True, progress: bool = True
) -> nn.Module:
    """Fit each operator's weight to the quantized inputs, round it with regard to them, then correct its bias.

    1. Least squares with a ridge towards the trained weight::

           W' = argmin E|(W x + r) - (W' x̂ + r̂)|² + λ |W' - W|²     λ = ridge · (1 + 16 K / n) · mean diag(H)
              = W + (W E[(x - x̂) x̂ᵀ] + E[(r - r̂) x̂ᵀ]) (H + λ I)^-1  H = E[x̂ x̂ᵀ]

       It undoes the part of the rounding errors before it that can be told from x̂ (Hubara et al. 2020, "Improving Post Training
       Neural Quantization: Layer-wise Calibration and Integer Programming", section 3.1, https://arxiv.org/abs/2006.10518, in
       closed form). The expectations are of centred values where the operator has a bias; with n positions and K inputs, a fit to
       few positions is trusted less.
    2. Rounding one input after the other, the error of each made up for by those still to be rounded, weighted by H (Frantar et al. 2022,
       "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", https://arxiv.org/abs/2210.17323).
       The largest weight of a channel stays at ±127, so the scale is ``max|w| / 127`` as before.
    3. `correct_bias`.

    What is left out there is left out here; operators with more than `LARGEST` inputs per output go through the third step only.

    Args:
        model: prepared and calibrated; changed in place. Its float weights become the rounded ones.
        data: as for `calibrate`; about 32 samples of it are used.
        ridge: how much the trained weights are trusted: small fits the data, large (1 and more) the weights.
        rounding: without it weights are rounded to nearest.
        progress: show a bar.

    Raises:
        QuantizationError: a ridge that is not positive; see also `lockstep.run`. The model is then unchanged.
    """
    if not ridge > 0:
        raise QuantizationError(f"reconstruct: ridge is {ridge}; it must be positive")
    shared = _shared(model)

    def visit(step: Step) -> None:
        group = step.group
        if not _is_open(group, shared):
            return
        weight = weight_matrix(group)
        if weight.shape[2] <= LARGEST:
            moments = _Moments(step, second=True)
            fitted = _least_squares(weight, moments, ridge)
            group.weight.detach().copy_(from_matrix(group, fitted))
            if rounding:
                scales = _scales(group)
                damping = 0.01 + moments.scarcity
                pinned = group.weight_quant.follows
                rounded = round_by_columns(fitted, scales, moments.second, pinned=pinned, damping=damping) * scales
                group.weight.detach().copy_(from_matrix(group, rounded))
        else:
            moments = _Moments(step, second=False)
        if group.bias is not None:
            _shift_bias(group, moments, weight, _as_quantized(group, weight_matrix(group)))

    lockstep.run(model, data, visit, progress=progress, title="reconstruct")
    return model


def _shared(model: nn.Module) -> Counter[int]:
    """How many groups use each weight."""
    return Counter(id(m.weight) for _, m in model.named_modules(remove_duplicate=False) if isinstance(m, QATGroup))


def _is_open(group: QATGroup, shared: Counter[int]) -> bool:
    return group.norm is None and shared[id(group.weight)] == 1


def _scales(group: QATGroup) -> Tensor:
    """The weight's scales now, float64 ``[groups, C_out / groups, 1]``."""
    return group.weight_quant.scales(group.weight, *group._layout).double().view(group.geometry.groups, -1, 1)


def _as_quantized(group: QATGroup, weight: Tensor) -> Tensor:
    scales = _scales(group)
    return (weight / scales).round().clamp(-127, 127) * scales


def _shift_bias(group: QATGroup, moments: _Moments, weight: Tensor, quantized: Tensor) -> None:
    assert group.bias is not None
    exact = (weight @ moments.mean_exact.unsqueeze(-1)).squeeze(-1)
    shift = exact - (quantized @ moments.mean.unsqueeze(-1)).squeeze(-1) + moments.mean_residual
    group.bias.detach().add_(shift.flatten())


class _Moments:
    """Expectations over positions, float64.

    Attributes:
        scarcity: K over the number of positions.
        mean, mean_exact: of x̂ and of x, ``[groups, K]``.
        mean_residual: of r - r̂, ``[groups, C_out / groups]``, 0 without an add.
        second: H, ``[groups, K, K]``.
        cross: E[(x - x̂) x̂ᵀ], ``[groups, K, K]``.
        cross_residual: E[(r - r̂) x̂ᵀ], ``[groups, C_out / groups, K]``, 0 without an add.
    """

    def __init__(self, step: Step, second: bool) -> None:
        group = step.group
        total = sum(positions(group, y) for y in step.outputs)
        generator = torch.Generator().manual_seed(0)
        sums: Counter[str] = Counter()
        count = 0
        centre: Tensor | None = None
        for exact, quantized, y in zip(step.exact, step.quantized, step.outputs, strict=True):
            here = positions(group, y)
            number = min(here, -(-POSITIONS * here // total))
            chosen = torch.randperm(here, generator=generator)[:number].sort().values.to(y.device)
            x, xq = (columns(group, dequantize(c.args[0]), y.shape, chosen) for c in (exact, quantized))
            count += number
            if centre is None:
                # About the mean, so that the float32 sums below lose nothing to it.
                centre = xq.mean(2, keepdim=True) if group.bias is not None else torch.zeros_like(xq[:, :, :1])
            difference, xq = x - xq, xq - centre
            found: dict[str, Tensor] = {"mean": xq.sum(2), "mean_difference": difference.sum(2)}
            residual = None
            if group.pattern.add:
                r, rq = (dequantize(c.args[1]).expand_as(y) for c in (exact, quantized))
                residual = at_positions(group, r - rq, chosen)
                found["mean_residual"] = residual.sum(2)
            if second:
                found["second"] = xq @ xq.mT
                found["cross"] = difference @ xq.mT
                if residual is not None:
                    found["cross_residual"] = residual @ xq.mT
            for name, value in found.items():
                sums[name] += value.double()  # type: ignore[assignment]
        means: dict[str, Any] = {name: value / count for name, value in sums.items()}
        assert centre is not None
        self.scarcity = means["mean"].shape[1] / count
        offset, difference_mean = means["mean"], means["mean_difference"]
        self.mean: Tensor = offset + centre.squeeze(2).double()
        self.mean_exact: Tensor = self.mean + difference_mean
        self.mean_residual: Tensor | float = means.get("mean_residual", 0.0)
        if not second:
            return
        self.second: Tensor = means["second"]
        self.cross: Tensor = means["cross"]
        self.cross_residual: Tensor | float = means.get("cross_residual", 0.0)
        if group.bias is None:
            return
        across = offset.unsqueeze(1)
        self.second = self.second - offset.unsqueeze(2) * across
        self.cross = self.cross - difference_mean.unsqueeze(2) * across
        if isinstance(self.mean_residual, Tensor):
            self.cross_residual = self.cross_residual - self.mean_residual.unsqueeze(2) * across
        # What float32 cannot tell from a constant counts as noise.
        least = _FLOAT32 * self.mean.square().mean(1, keepdim=True)
        self.second += torch.diag_embed(least.expand_as(self.mean))


def _least_squares(weight: Tensor, moments: _Moments, ridge: float) -> Tensor:
    error = weight @ moments.cross + moments.cross_residual
    return weight + torch.linalg.solve(_damped(moments.second, ridge * (1 + 16 * moments.scarcity)), error, left=False)


def _damped(second: Tensor, share: float) -> Tensor:
    """``H + share · mean diag(H) I``, positive definite also where a group's inputs are always zero."""
    diagonal = second.diagonal(dim1=1, dim2=2)
    more = share * diagonal.mean(1, keepdim=True).clamp(min=1e-30)
    return second + torch.diag_embed(more.expand_as(diagonal))


def round_by_columns(weight: Tensor, scales: Tensor, second: Tensor, *, pinned: bool, damping: float = 0.01) -> Tensor:
    """Integers in [-127, 127] for weights, by GPTQ: columns in descending order of diag(H), errors passed on.

    With U the upper Cholesky factor of H^-1, rounding column i to q leaves ``e = (w_i - s q) / U_ii``, and every later column j
    becomes ``w_j - e U_ij``.

    Args:
        weight: float64 ``[groups, rows, K]``.
        scales: float64 ``[groups, rows, 1]``.
        second: H, float64 ``[groups, K, K]``.
        pinned: the largest weight of each row becomes ±127 whatever was passed on to it.
        damping: added to H's diagonal, as a share of its mean.

    Returns:
        float64, as `weight`.
    """
    groups, rows, size = weight.shape
    order = second.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    across, down = order.unsqueeze(1).expand(-1, rows, -1), order.unsqueeze(2).expand(-1, -1, size)
    h = _damped(second, damping).gather(1, down).gather(2, order.unsqueeze(1).expand(-1, size, -1))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    w = weight.gather(2, across) / scales
    largest = w.abs().argmax(2)
    limit = 127 * w.gather(2, largest.unsqueeze(2)).sign().squeeze(2)
    q = torch.empty_like(w)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        errors = w.new_empty(groups, rows, stop - start)
        for i in range(start, stop):
            column = w[:, :, i].round().clamp_(-127, 127)
            q[:, :, i] = torch.where(largest == i, limit, column) if pinned else column
            error = (w[:, :, i] - q[:, :, i]) / upper[:, i, i].unsqueeze(1)
            w[:, :, i:stop] -= error.unsqueeze(2) * upper[:, i, i:stop].unsqueeze(1)
            errors[:, :, i - start] = error
        w[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return torch.empty_like(q).scatter_(2, across, q)
