"""What fused, what nearly did and why not, as values; text, JSON and HTML are views of them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from horizon_plugin_pytorch.fusion.patterns import Pattern

Kind = Literal["norm", "add", "activation"]
Section = tuple[str, list[str], list[list[str]]]
"""Title, columns and rows."""


@dataclass(frozen=True)
class Group:
    """One fused group.

    Attributes:
        pattern: the point in the grid that matched, e.g. ``ConvBNAddReLU2d``.
        modules: where its parts were in the model, in calling order; a part that was a function is named like its node.
        name: the module that computes the group in the fused model.
        absorbed: the norm is absorbed (otherwise kept inside the group).
        source: ``file:line`` of the anchor's call, where known.
    """

    pattern: Pattern
    modules: tuple[str, ...]
    name: str
    absorbed: bool
    source: str | None = None

    @property
    def has_norm(self) -> bool:
        return self.pattern.norm

    @property
    def has_add(self) -> bool:
        return self.pattern.add

    @property
    def activation(self) -> str | None:
        return self.pattern.activation.label if self.pattern.activation else None


@dataclass(frozen=True)
class Miss:
    """Something that could stand in a group and does not.

    Attributes:
        kind: ``norm``, ``add`` or ``activation``.
        modules: the operator that was left out, and the anchor it follows, if any.
        reason: why.
        source: ``file:line`` of its call, where known.
        shared: the one of `modules` that is called more than once, if one is.
    """

    kind: Kind
    modules: tuple[str, ...]
    reason: str
    source: str | None = None
    shared: str | None = None


@dataclass(frozen=True)
class Untraced:
    """A module that symbolic tracing left whole: its parts were looked at one by one."""

    module: str
    type: str
    reason: str


@dataclass
class FusionReport:
    """Groups, misses and what could not be traced, for one model."""

    model: str
    groups: list[Group] = field(default_factory=list)
    missed: list[Miss] = field(default_factory=list)
    untraced: list[Untraced] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self) -> dict[str, int]:
        """How many of each pattern fused, most frequent first."""
        names = [g.pattern.name for g in self.groups]
        return {n: names.count(n) for n in sorted(set(names), key=lambda n: (-names.count(n), n))}

    def to_dict(self) -> dict[str, Any]:
        groups = [{**asdict(g), "pattern": g.pattern.name} for g in self.groups]
        return {**asdict(self), "groups": groups}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def tables(self) -> list[Section]:
        """Every non-empty part; what the text and the HTML view show."""
        parts: list[Section] = [
            (f"Fused: {len(self.groups)} groups", ["pattern", "modules", "stands at", "source"],
             [[g.pattern.name, ", ".join(g.modules), g.name, _short(g.source)] for g in self.groups]),
            (f"Not fused: {len(self.missed)}", ["what", "modules", "reason", "source"],
             [[m.kind, ", ".join(m.modules), m.reason, _short(m.source)] for m in self.missed]),
            (f"Not traced as a whole: {len(self.untraced)}", ["module", "type", "reason"],
             [[u.module or "(the model)", u.type, u.reason] for u in self.untraced]),
            ("Notes", ["note"], [[n] for n in self.notes]),
        ]  # fmt: skip
        return [_without_empty_column(part) for part in parts if part[2]]

    def summary(self) -> str:
        counts = ", ".join(f"{n} {name}" for name, n in self.count().items())
        return f"{self.model}: {len(self.groups)} groups fused ({counts or 'none'}), {len(self.missed)} left out"

    def to_text(self, width: int = 140) -> str:
        from io import StringIO

        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        out = StringIO()
        console = Console(file=out, width=width)
        console.print(Text(self.summary()))
        for title, columns, rows in self.tables():
            table = Table(title=title, title_justify="left", show_lines=False)
            for column in columns:
                table.add_column(column, overflow="fold")
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            console.print(table)
        return out.getvalue()

    def to_html(self) -> str:
        """A self-contained page."""
        from jinja2 import Environment

        return Environment(autoescape=True).from_string(_PAGE).render(report=self)

    def __str__(self) -> str:
        return self.to_text()


def _without_empty_column(part: Section) -> Section:
    """A table without its last column where no row has anything in it."""
    title, columns, rows = part
    return part if any(row[-1] for row in rows) else (title, columns[:-1], [row[:-1] for row in rows])


def _short(source: str | None) -> str:
    """A source line without the part of its path that every reader knows."""
    if source is None:
        return ""
    here = os.getcwd() + os.sep
    return source.rpartition(f"site-packages{os.sep}")[2] if "site-packages" in source else source.removeprefix(here)


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Fusion of {{ report.model }}</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1b2733 }
 table { border-collapse: collapse; width: 100%; margin: .5rem 0 2rem } caption { text-align: left; font-weight: 600; padding: .4rem 0 }
 th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid #dde3e8 }
 th { background: #f2f5f7 } td { overflow-wrap: anywhere } td:first-child { white-space: nowrap; font-family: ui-monospace, monospace }
</style>
<h1>Fusion of {{ report.model }}</h1>
<p>{{ report.summary() }}</p>
{% for title, columns, rows in report.tables() %}
<table><caption>{{ title }}</caption>
<thead><tr>{% for c in columns %}<th>{{ c }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{% endfor %}</html>
"""
