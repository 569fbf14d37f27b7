"""Automatic fusion on real networks, beside PyTorch's own two.

For every network: how many of the Conv→BN pairs that are legal to absorb were absorbed, how many additions and
activations were fused, whether the outputs stayed the same, how long fusing took, and the float latency before and
after. Each network runs in a process of its own, so that one that crashes or fills the memory costs only its row;
a row that is there is not measured again.

    python benchmarks/fusion.py                           # everything; resumes
    python benchmarks/fusion.py run resnet mobilenet      # those whose name contains a word
    python benchmarks/fusion.py scale                     # how the time to fuse grows
    python benchmarks/fusion.py table                     # docs/zoo.md from what has been measured
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the networks and the oracle are the tests'

RESULTS = ROOT / "build" / "benchmarks" / "fusion"
TABLE = ROOT / "docs" / "zoo.md"
SCALE_LAYERS = (50, 500, 2000)

app = typer.Typer(add_completion=False, rich_markup_mode=None)


# -- the two peers -----------------------------------------------------------------------------------------------------


def torch_ao(model: Any) -> Any:
    """``torch.ao.quantization.quantize_fx.fuse_fx``."""
    from torch.ao.quantization.quantize_fx import fuse_fx

    return fuse_fx(model)


def torch_fx(model: Any) -> Any:
    """``torch.fx.experimental.optimization.fuse``."""
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


def ours(model: Any) -> Any:
    """``horizon_plugin_pytorch.quantization.fuse_fx``."""
    from horizon_plugin_pytorch.quantization import fuse_fx

    return fuse_fx(model)


PEERS: dict[str, Callable[[Any], Any]] = {"torch.ao": torch_ao, "torch.fx": torch_fx}


@dataclass
class PeerResult:
    """What another library's fusion did to a network."""

    error: str | None = None
    absorbed: int = 0
    adds: int = 0
    activations: int = 0
    seconds: float | None = None
    difference: float | None = None


def measure_peer(fuse: Callable[[Any], Any], case: Any) -> PeerResult:
    """Fuses a copy of the network and counts what is left in it."""
    import torch

    from models import oracle, verify

    result = PeerResult()
    model = copy.deepcopy(case.model)
    try:
        start = time.perf_counter()
        fused = fuse(model)
        result.seconds = time.perf_counter() - start
        result.absorbed = case.trace.norm_calls - oracle.trace(fused, case.inputs).norm_calls
        with torch.no_grad():
            result.difference, result.error = verify.compare(case.expected, fused(*case.inputs))
    except Exception as error:
        result.error = verify.describe(error)
        return result
    groups = [type(m).__name__ for m in fused.modules() if "nn.intrinsic" in type(m).__module__]
    groups = [kind for kind in groups if kind.startswith(("Conv", "Linear"))]  # not torch.ao's BNReLU
    result.adds = sum("Add" in kind for kind in groups)
    result.activations = sum("ReLU" in kind for kind in groups)
    return result


# -- one network -------------------------------------------------------------------------------------------------------


@dataclass
class Latency:
    """Median milliseconds of processor time of a forward, batch 1, float32, one thread; the two networks took turns."""

    size: list[int]
    unfused: float
    fused: float
    runs: int


@dataclass
class Row:
    """Everything measured on one network."""

    name: str
    parameters: int = 0
    verdict: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    latency: dict[str, Any] | None = None
    error: str | None = None  # the process died

    @property
    def runs(self) -> bool:
        """Whether the fused network gave an output."""
        return self.verdict.get("difference") is not None


def measure(name: str) -> Row:
    """All measurements of one network but its latency, in this process."""
    from models import verify

    warm_up()
    try:
        case = verify.load(name)
    except Exception as error:
        return Row(name, verdict=verify.Verdict(name, unfused_error=verify.describe(error)).to_dict())
    verdict = verify.judge(case)
    row = Row(name, sum(p.numel() for p in case.model.parameters()), verdict.to_dict())
    for peer, fuse in PEERS.items():
        gc.collect()
        row.peers[peer] = asdict(measure_peer(fuse, case))
    return row


def measure_latency(name: str, seconds: float) -> Latency:
    """Alternating forwards of the network and its fused form, for about ``seconds``, 3 to 30 each."""
    import torch

    from models import zoo

    model = zoo.build(name, native=True)
    size = zoo.native_size(name, model)
    inputs = zoo.example_inputs(name, size, batch=1, dtype=torch.float32)
    networks = (model, ours(model))
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for network in networks:
            network(*inputs)
        end = time.perf_counter() + seconds
        while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < 30):
            for network, taken in zip(networks, times, strict=True):
                start = time.process_time()
                network(*inputs)
                taken.append(1e3 * (time.process_time() - start))
    return Latency(list(size), statistics.median(times[0]), statistics.median(times[1]), len(times[0]))


def warm_up() -> None:
    """Imports everything the fusers import lazily, so that no network's time includes it."""
    from torch import nn

    tiny = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
    for fuse in (ours, *PEERS.values()):
        with contextlib.suppress(Exception):  # a peer that is not there shows in its column
            fuse(copy.deepcopy(tiny))


# -- how the time to fuse grows ----------------------------------------------------------------------------------------


def residual_network(layers: int) -> Any:
    """A stack of residual blocks with ``layers`` convolutions in all, each followed by a norm, narrow as only the graph
    matters."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.bn1(self.conv1(x)))
            return torch.relu(self.bn2(self.conv2(y)) + x)

    return nn.Sequential(*(Block() for _ in range(layers // 2))).eval()


def measure_scale(repeats: int = 3) -> dict[str, dict[int, float]]:
    """Milliseconds of processor time per layer to fuse, the best of ``repeats``, for ours and the peers; and of tracing
    alone."""
    import torch.fx

    torch.set_num_threads(1)
    warm_up()
    fusers = {"ours": ours, **PEERS, "symbolic_trace alone": torch.fx.symbolic_trace}
    result: dict[str, dict[int, float]] = {name: {} for name in fusers}
    for layers in SCALE_LAYERS:
        for name, fuse in fusers.items():
            times = []
            for _ in range(repeats):
                model = residual_network(layers)
                start = time.process_time()
                fuse(model)
                times.append(time.process_time() - start)
            result[name][layers] = 1e3 * min(times) / layers
    return result


# -- commands ----------------------------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True, help=__doc__)
def everything(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        scale()
        run()


def load(results: Path) -> list[Row]:
    """All rows measured so far, in the order of the list."""
    from models import zoo

    order = {name: i for i, name in enumerate(zoo.names())}
    rows = [Row(**json.loads(path.read_text())) for path in results.glob("*.json") if path.name != "scale.json"]
    return sorted((row for row in rows if row.name in order), key=lambda row: order[row.name])


def _path(results: Path, name: str) -> Path:
    return results / f"{name.replace('/', '.')}.json"


@app.command()
def run(
    words: Annotated[list[str] | None, typer.Argument(help="only networks whose name contains one of these")] = None,
    results: Annotated[Path, typer.Option(help="where a JSON per network is kept")] = RESULTS,
    timeout: Annotated[float, typer.Option(help="seconds a network may take")] = 600,
    latency_seconds: Annotated[float, typer.Option(help="seconds of latency runs per network; 0: none")] = 2,
    again: Annotated[bool, typer.Option(help="measure networks that have problems again")] = False,
    workers: Annotated[int, typer.Option(help="processes at a time")] = 1,
) -> None:
    """Measure networks, each in its own process, and write the table."""
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from models import zoo

    results.mkdir(parents=True, exist_ok=True)
    names = [n for n in zoo.names() if not words or any(w in n for w in words)]
    todo = [n for n in names if _missing(_path(results, n), again, latency_seconds > 0)]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("fusing", total=len(names), completed=len(names) - len(todo))

        def one(name: str) -> None:
            progress.update(bar, description=name)
            row = _in_process(name, _path(results, name), timeout, latency_seconds)
            progress.console.print(_line(row), soft_wrap=True)
            progress.advance(bar)

        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, todo))
    table(results)


def _missing(path: Path, again: bool, latency: bool) -> bool:
    """Whether there is something to measure; forgets what is to be measured again."""
    if not path.exists():
        return True
    row = Row(**json.loads(path.read_text()))
    if again and (row.error or row.verdict["problems"]):
        path.unlink()
        return True
    return latency and row.latency is None and row.runs


def _in_process(name: str, path: Path, timeout: float, latency_seconds: float) -> Row:
    command = [sys.executable, __file__, "one", name, str(path), "--latency-seconds", str(latency_seconds)]
    try:
        done = subprocess.run(command, timeout=timeout, capture_output=True, text=True)
        last = (done.stderr.strip().splitlines() or [""])[-1]
        error = None if done.returncode == 0 else f"its process ended with {done.returncode}: {last[:300]}"
    except subprocess.TimeoutExpired:
        error = f"not done in {timeout:.0f} s"
    row = Row(**json.loads(path.read_text())) if path.exists() else Row(name)
    if error:
        row.error = error
        path.write_text(json.dumps(asdict(row), indent=1))
    return row


def _line(row: Row) -> str:
    v = row.verdict
    if reason := row.error or v["unfused_error"]:
        return f"[yellow]{row.name}: {reason}"
    state = "[red]" + "; ".join(v["problems"][:2]) if v["problems"] else "[green]ok"
    peers = ", ".join(f"{p} {'fails' if r['error'] else r['absorbed']}" for p, r in row.peers.items())
    if row.latency:
        state += f", {row.latency['unfused']:.1f} → {row.latency['fused']:.1f} ms"
    return f"{row.name}: {v['absorbed']} of {v['legal']} absorbed ({peers}), difference {v['difference']} {state}"


@app.command()
def one(name: str, path: Path, latency_seconds: float = 2) -> None:
    """Measure in this process what is missing of one network, and write its JSON."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if path.exists():
        row = Row(**json.loads(path.read_text()))
    else:
        row = measure(name)
        path.write_text(json.dumps(asdict(row), indent=1))
    if latency_seconds and row.runs:
        row.latency = asdict(measure_latency(name, latency_seconds))
        path.write_text(json.dumps(asdict(row), indent=1))


@app.command()
def scale(results: Path = RESULTS) -> None:
    """Measure how the time to fuse grows with the number of layers."""
    warnings.simplefilter("ignore")
    results.mkdir(parents=True, exist_ok=True)
    measured = measure_scale()
    (results / "scale.json").write_text(json.dumps(measured, indent=1))
    for name, times in measured.items():
        print(name, ", ".join(f"{layers} layers: {ms:.2f} ms per layer" for layers, ms in times.items()))


@app.command()
def table(results: Path = RESULTS, output: Path = TABLE) -> None:
    """Write docs/zoo.md from what has been measured."""
    from _fusion_table import render

    scaled = results / "scale.json"
    rows = load(results)
    output.write_text(render(rows, json.loads(scaled.read_text()) if scaled.exists() else None))
    print(f"{len(rows)} networks in {output}")


if __name__ == "__main__":
    app()
