"""Checks on a float model before it is quantized."""

from __future__ import annotations

from typing import Any

from torch import nn


def check_unfused_operations(model: nn.Module, example_inputs: Any, print_tabulate: bool = True) -> list[list[str]]:
    """Operators of a float model that could be fused and are not.

    Args:
        model: the float model, fused or not.
        example_inputs: a tensor, a tuple of the model's arguments or a dict of keyword arguments.
        print_tabulate: also print a table per group: name and type.

    Returns:
        the names of each unfused group in calling order; a module that is called more than once is marked ``(shared)``.
    """
    from horizon_plugin_pytorch.fusion.by_graph import analyze

    report = analyze(model, example_inputs)
    unfused = [list(group.modules) for group in report.groups]
    for miss in report.missed:
        if miss.shared is not None:
            unfused.append([f"{name}(shared)" if name == miss.shared else name for name in miss.modules])
    if print_tabulate:
        _print(model, unfused)
    return unfused


def _print(model: nn.Module, unfused: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not unfused:
        console.print("No fusable operator is left unfused.")
    modules = dict(model.named_modules())
    for names in unfused:
        table = Table("name", "type")
        for name in names:
            module = modules.get(name.removesuffix("(shared)"))
            table.add_row(name, type(module).__name__ if module is not None else "function")
        console.print(table)
