"""What happens to BN when a model is prepared for quantization-aware training.

| mode | BN during training | absorbed |
|---|---|---|
| `QATMode.FuseBN` (default) | none | when the float model is fused |
| `QATMode.WithBN` | trained, inside the fused group | at convert, or by `absorb_bn` |
| `QATMode.WithBNReverseFold` | the same | the same |

The vendor's reverse fold computes the weight's scale with BN's factor taken into account, so that absorbing BN in the middle of
training changes nothing. With one symmetric scale per output channel that holds by itself: for a factor k,
``quantize(w * k) == sign(k) * quantize(w)`` with scale ``|k| * s_w``, exactly. So WithBNReverseFold is accepted and needs nothing
more than WithBN.
"""

from __future__ import annotations

from enum import Enum


class QATMode(str, Enum):
    FuseBN = "fuse_bn"
    WithBN = "with_bn"
    WithBNReverseFold = "with_bn_reverse_fold"


_mode = QATMode.FuseBN


def set_qat_mode(mode: QATMode | str) -> None:
    """Set the mode for models fused or prepared from now on.

    Raises:
        ValueError: not one of ``fuse_bn``, ``with_bn``, ``with_bn_reverse_fold``.
    """
    global _mode
    try:
        _mode = QATMode(mode)
    except ValueError:
        raise ValueError(f"set_qat_mode: {mode!r} is not one of {[m.value for m in QATMode]}") from None


def get_qat_mode() -> QATMode:
    return _mode


def keeps_bn(is_qat: bool) -> bool:
    """Whether a group fused now keeps BN inside."""
    return is_qat or _mode is not QATMode.FuseBN
