"""The report: groups, misses and their reasons, as values, JSON, HTML and text."""

from __future__ import annotations

import inspect
import json
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from horizon_plugin_pytorch.fusion import FusionReport, Group, Miss, analyze
from horizon_plugin_pytorch.fusion.patterns import RELU, Pattern, anchor_of
from horizon_plugin_pytorch.quantization import fuse_fx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.shared, self.bn1, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn(self.conv(x))  # line: group
        y = F.relu6(y + x)
        z = self.shared(y)
        u = self.bn1(z)  # line: miss
        return u + self.bn2(self.shared(x)) * x.mean()


def line(marker: str) -> str:
    source, first = inspect.getsourcelines(Net)
    (offset,) = [i for i, text in enumerate(source) if f"# line: {marker}" in text]
    return f"{__file__}:{first + offset}"


def test_values() -> None:
    report = analyze(Net().eval())
    assert report.model == "Net"
    assert [(g.pattern.name, g.modules, g.name, g.absorbed) for g in report.groups] == [
        ("ConvBNReLU2d", ("stem.0", "stem.1", "stem.2"), "stem.0", True),
        ("ConvBNAddReLU62d", ("conv", "bn", "add", "relu6"), "_generated_add_0", True),
    ]
    first, second = report.groups
    assert (first.has_norm, first.has_add, first.activation) == (True, False, "ReLU")
    assert (second.has_norm, second.has_add, second.activation) == (True, True, "ReLU6")
    assert report.count() == {"ConvBNAddReLU62d": 1, "ConvBNReLU2d": 1}
    norms = {m.modules: m for m in report.missed if m.kind == "norm"}
    assert set(norms) == {("shared", "bn1"), ("shared", "bn2")}
    assert all(m.shared == "shared" and "is called 2 times" in m.reason for m in norms.values())


def test_sources_are_the_users_lines() -> None:
    report = analyze(Net().eval())
    assert report.groups[1].source == line("group")
    assert {m.modules: m.source for m in report.missed}[("shared", "bn1")] == line("miss")
    for entry in (*report.groups, *report.missed):
        assert entry.source is not None and entry.source.startswith(f"{__file__}:")


def test_a_sequential_has_no_line_of_the_user() -> None:
    """Its forward is PyTorch's, and who asked for the analysis did not write it."""
    report = analyze(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    assert report.groups[0].source is None


@pytest.mark.parametrize("is_qat", [False, True])
@pytest.mark.parametrize("example_inputs", [None, torch.randn(2, 3, 4, 4)])
def test_analyzing_says_what_fusing_does(is_qat: bool, example_inputs: Any) -> None:
    model = Net().eval()
    expected = analyze(model, example_inputs, is_qat=is_qat)
    fused = fuse_fx(model, example_inputs=example_inputs, is_qat=is_qat)
    assert fused.fusion_report == expected
    assert all(group.absorbed is not is_qat for group in expected.groups)
    for group in expected.groups:
        name = group.pattern.name if is_qat else Pattern(*vars(group.pattern).values()).name.replace("BN", "")
        assert type(fused.get_submodule(group.name)).__name__ == name


def test_json_holds_everything() -> None:
    report = analyze(Net().eval())
    data = json.loads(report.to_json())
    assert set(data) == {"model", "groups", "missed", "untraced", "notes"}
    assert data["groups"][0] == {
        "pattern": "ConvBNReLU2d",
        "modules": ["stem.0", "stem.1", "stem.2"],
        "name": "stem.0",
        "absorbed": True,
        "source": report.groups[0].source,
    }
    assert [m["reason"] for m in data["missed"]] == [m.reason for m in report.missed]


def dangerous() -> FusionReport:
    anchor = anchor_of(nn.Conv2d(1, 1, 1))
    assert anchor is not None
    return FusionReport(
        "<script>alert(1)</script>",
        [Group(Pattern(anchor, activation=RELU), ("a<b>", "[bold]r"), "a<b>", True, "f.py:1")],
        [Miss("norm", ("x & y",), 'because "<i>"', None)],
        [],
        ["[red]note[/red]"],
    )


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_html_escapes_and_is_one_page() -> None:
    html = dangerous().to_html()
    page = Text()
    page.feed(html)
    assert "script" not in page.tags and "i" not in page.tags and "b" not in page.tags
    assert {"html", "table", "caption", "th", "td"} <= set(page.tags)
    for text in ("a<b>, [bold]r", 'because "<i>"', "x & y", "[red]note[/red]"):
        assert text in page.texts
    assert "http" not in html


def test_html_has_a_row_for_everything() -> None:
    report = analyze(Net().eval())
    page = Text()
    page.feed(report.to_html())
    for reason in (m.reason for m in report.missed):
        assert reason in page.texts
    assert page.tags.count("table") == 2
    assert page.tags.count("tr") == 2 + len(report.groups) + len(report.missed)


def test_text_shows_names_as_they_are() -> None:
    text = dangerous().to_text(width=120)
    for part in ("a<b>, [bold]r", 'because "<i>"', "x & y", "[red]note[/red]", "ConvReLU2d"):
        assert part in text


def test_text_keeps_its_width() -> None:
    report = analyze(Net().eval())
    assert max(map(len, report.to_text(width=80).splitlines())) <= 80
    assert "2 groups fused" in str(report)


def test_an_empty_report() -> None:
    report = analyze(nn.Identity())
    assert report.groups == [] and report.missed == []
    assert "0 groups fused (none)" in report.to_text()
    assert json.loads(report.to_json())["groups"] == [] and "<table>" not in report.to_html()
