"""Plans made by hand for export: with recorded shapes, which hand-made plans elsewhere leave open on purpose."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from horizon_plugin_pytorch.plan import Plan
from plan.native import plans


def recorded(made: plans.Maker, outputs: Any, *inputs: Tensor) -> Plan:
    """The plan, as if it had been recorded with these inputs."""
    plan = made.plan(outputs)
    values = list(plan.values)
    for i, x in enumerate(inputs):
        values[i] = dataclasses.replace(values[i], shape=tuple(x.shape))
    return dataclasses.replace(plan, values=tuple(values))
