"""int8 on this package's CPU kernels beside what else a user could run: PyTorch, torch.ao, torchao, ONNX Runtime, OpenVINO.

    python benchmarks/cpu.py                                     # everything; hours. Stopped and started again it goes on
    python benchmarks/cpu.py run --networks resnet50 --batches 1 --threads 2 --peers OpenVINO
    python benchmarks/cpu.py run --isa avx2                      # both sides capped to an instruction set
    python benchmarks/cpu.py memory                              # peak memory, each candidate in a process of its own
    python benchmarks/cpu.py scaling                             # how our time grows with images and with pixels
    python benchmarks/cpu.py table --write                       # docs/cpu.md from what has been measured
    python benchmarks/cpu.py pack DIR                            # plans and OpenVINO models without their weights, a few MB, and
    python benchmarks/cpu.py packed DIR                          # their times on a machine that has PyTorch and openvino only

One network, batch size and number of threads is one process, restricted to as many cores, in which all candidates are built and then
run in turns on the same random input. Its JSON goes to ``build/benchmarks/cpu/results``, models that are made once beside it; delete a
file to make it again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "benchmarks" / "cpu"
TABLE = ROOT / "docs" / "cpu.md"
PICTURE = TABLE.parent / "images" / "cpu-scaling.svg"
ISAS = ("amx", "avx512_vnni", "avx2", "portable")
ROUNDS_OF_CEILING = 5


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument("--folder", type=Path, default=FOLDER, help="of results and of models that are made once")
    what = argparse.ArgumentParser(add_help=False, parents=[folder])
    what.add_argument("--networks", nargs="+", metavar="NAME", help="names of benchmarks/_networks.py")
    what.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    what.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    what.add_argument("--peers", nargs="+", metavar="WORD", help="candidates whose name contains one of these words")
    what.add_argument("--isa", choices=ISAS, help="cap both sides to this instruction set")
    what.add_argument("--rounds", type=int, default=15)
    what.add_argument("--timeout", type=float, default=3600, help="seconds for one process")
    what.add_argument("--again", action="store_true", help="measure what has been measured, too")
    what.add_argument("--json", type=Path, help="also write all results of this run to one file")
    for name, text in (("run", "measure times"), ("memory", "measure peak memory")):
        commands.add_parser(name, parents=[what], help=text)
    for name in ("pack", "packed"):
        command = commands.add_parser(name, parents=[what], help=f"see above: {name} DIR")
        command.add_argument("directory", type=Path)
    scaling = commands.add_parser("scaling", parents=[folder], help="see above")
    scaling.add_argument("--networks", nargs="+", metavar="NAME")
    scaling.add_argument("--threads", nargs="+", type=int, default=[2])
    scaling.add_argument("--rounds", type=int, default=9)
    table = commands.add_parser("table", parents=[folder], help="show the table")
    table.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    one = commands.add_parser("one")
    one.add_argument("job", type=json.loads)
    options = parser.parse_args(arguments or ["run"])

    if options.command == "one":
        (scale_here if options.job.pop("scaling", False) else measure_here)(**options.job)
    elif options.command == "table":
        show_table(options.folder, options.write)
    elif options.command == "scaling":
        scale(options)
    elif options.command == "pack":
        from _cpu_pack import pack

        pack(options.directory, options.folder / "models", _networks(options.networks))
    elif options.command == "packed":
        from _cpu_pack import unpack

        models = unpack(options.directory)
        wanted = options.networks or sorted(p.name for p in models.iterdir() if (p / "plan.safetensors").exists())
        measure_all(options, wanted, models, packed=True)
    else:
        measure_all(options, _networks(options.networks), options.folder / "models", packed=False)


def _networks(names: Sequence[str] | None) -> list[str]:
    from _networks import NETWORKS

    unknown = sorted(set(names or ()) - set(NETWORKS))
    if unknown:
        raise SystemExit(f"no network {unknown}; there are {', '.join(NETWORKS)}")
    return list(names or NETWORKS)


def _candidates(words: Sequence[str] | None, packed: bool) -> list[str]:
    """The candidates meant by these words; without words, all. Ours is always there: the others are compared with it."""
    from _cpu_peers import CANDIDATES, NEED_ONLY_FILES, OURS

    names = [n for n in CANDIDATES if not packed or n in NEED_ONLY_FILES]
    return [n for n in names if n == OURS or not words or any(w.lower() in n.lower() for w in words)]


# -- processes ------------------------------------------------------------------------------------------------------------


def measure_all(options: argparse.Namespace, networks: Sequence[str], models: Path, packed: bool) -> None:
    results = []
    for network in networks:
        for batch in options.batches:
            for threads in options.threads:
                name = "-".join([network, f"b{batch}", f"t{threads}", options.isa or "best", *["packed"] * packed])
                path = options.folder / "results" / f"{name}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                job = {
                    "network": network, "batch": batch, "threads": threads, "isa": options.isa, "rounds": options.rounds,
                    "models": str(models / network), "path": str(path), "packed": packed,
                }  # fmt: skip
                candidates = _candidates(options.peers, packed)
                if options.command == "memory":
                    measure_memory(job, candidates, options)
                else:
                    measure_times(job, candidates, options)
                results.append(_load(path))
                print(_line(results[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def measure_times(job: dict[str, Any], candidates: list[str], options: argparse.Namespace) -> None:
    """In a process of their own; what a candidate that ends the process was doing is its error, and the others go on without it."""
    path = Path(job["path"])
    rows = _load(path).get("rows", {})
    wanted = candidates if options.again else [n for n in candidates if not {"seconds", "error"} & set(rows.get(n, {}))]
    if not wanted:
        return
    first = candidates[0]
    wanted = [first, *(n for n in wanted if n != first)]
    while len(wanted) > 1 or wanted == candidates:
        error = _process({**job, "candidates": wanted}, options.timeout)
        if error is None:
            return
        during = path.with_suffix(".during")
        culprit = during.read_text() if during.exists() else first
        _merge(path, {"rows": {culprit: {"error": error}}})
        if culprit == first:
            return
        wanted.remove(culprit)


def measure_memory(job: dict[str, Any], candidates: list[str], options: argparse.Namespace) -> None:
    path = Path(job["path"])
    for name in candidates:
        row = _load(path).get("rows", {}).get(name, {})
        if options.again or not {"memory", "error"} & set(row):
            error = _process({**job, "candidates": [name], "memory": True}, options.timeout)
            if error:
                _merge(path, {"rows": {name: {"error": error}}})


def scale(options: argparse.Namespace) -> None:
    """Each network, axis and number of threads in a process of its own."""
    from _cpu_scaling import AXES, NETWORKS

    for network in _networks(options.networks or NETWORKS):
        for axis in AXES:
            for threads in options.threads:
                path = options.folder / "scaling" / f"{network}-{axis}-t{threads}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                job = {
                    "scaling": True, "network": network, "axis": axis, "threads": threads, "isa": None, "rounds": options.rounds,
                    "models": str(options.folder / "models" / network), "path": str(path),
                }  # fmt: skip
                error = _process(job, timeout=3600)
                print(f"{path.stem}: {error or 'measured'}", flush=True)


def scale_here(network: str, axis: str, threads: int, isa: str | None, rounds: int, models: str, path: str) -> None:
    import _cpu_measure as measure

    measure.pin(threads)  # before any pool of threads starts
    import torch
    from _cpu_peers import Work
    from _cpu_scaling import measure_scaling
    from _networks import NETWORKS

    torch.set_num_threads(threads)
    work = Work(Path(models), 1, threads, isa, NETWORKS[network])
    result = measure_scaling(work, axis, rounds)
    Path(path).write_text(json.dumps({"machine": measure.machine(), "threads": threads, **result}, indent=1))


def _process(job: dict[str, Any], timeout: float) -> str | None:
    """None, or why the process ended before it was done."""
    from _cpu_peers import environment

    command = [sys.executable, __file__, "one", json.dumps(job)]
    Path(job["path"]).with_suffix(".during").unlink(missing_ok=True)
    try:
        done = subprocess.run(
            command, env=environment(job["threads"], job["isa"]), timeout=timeout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done in {timeout:.0f} s"
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return None if done.returncode == 0 else f"its process ended with {done.returncode}: {last[:200]}"


def measure_here(
    network: str, batch: int, threads: int, isa: str | None, rounds: int, models: str, path: str, packed: bool,
    candidates: list[str], memory: bool = False,
) -> None:  # fmt: skip
    """Measure in this process and add to the JSON at `path`."""
    import _cpu_measure as measure

    measure.pin(threads)  # before any pool of threads starts
    import _cpu_peers as peers
    import torch

    from horizon_plugin_pytorch.utils.timing import take_turns

    torch.set_num_threads(threads)
    during = Path(path).with_suffix(".during")
    known = None
    if not packed:
        from _networks import NETWORKS

        known = NETWORKS[network]
    work = peers.Work(Path(models), batch, threads, isa, known)
    result: dict[str, Any] = {
        "network": network, "title": network if known is None else known.title, "batch": batch, "threads": threads, "isa": isa,
        "machine": measure.machine(), "packed": packed, "rows": {},
    }  # fmt: skip
    rows, forwards = result["rows"], {}
    for name in candidates:
        during.write_text(name)
        try:
            if memory:
                if peers.prepare(name, work):
                    os.execv(sys.executable, [sys.executable, *sys.argv])  # once more, without what making files took
                rows[name] = {"memory": measure.peak_memory(lambda name=name: peers.CANDIDATES[name](work))}
                continue
            forward = peers.CANDIDATES[name](work)
            forward()
            forwards[name] = forward
        except ImportError as error:
            rows[name] = {"error": f"not installed: {error.name or error}"}
        except Exception as error:
            rows[name] = {"error": f"{type(error).__name__}: {_reason(error)}"}
    if peers.OURS in forwards:
        during.write_text(peers.OURS)
        times = take_turns(forwards, rounds, measure.TURN_SECONDS)
        for name, seconds in times.items():
            ratios = [theirs / own for theirs, own in zip(seconds, times[peers.OURS], strict=True)]
            rows[name] = {"seconds": median(seconds), "ratio": median(ratios), "rounds": len(seconds)}
        expected = work.plan.compile("reference")(work.x)
        result |= {
            "differ": measure.differing(forwards[peers.OURS](), expected),
            "elements": sum(t.numel() for t in measure.tensors(expected)),
            "operations": measure.operations(work.plan, batch),
            "bytes": measure.least_bytes(work.plan, batch),
            "ceiling": measure.ceiling(threads, ROUNDS_OF_CEILING),
            "report": work.plan.compile("cpu", threads).report,
        }
    _merge(Path(path), result)
    during.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """The first line that says something: OpenVINO begins with lines that say where in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("Exception from")]
    return (telling or lines or [""])[0][:200]


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _merge(path: Path, new: dict[str, Any]) -> None:
    """Add to a result; a candidate that was measured again loses the error it had."""
    result = _load(path)
    rows = result.get("rows", {})
    for name, row in new["rows"].items():
        rows[name] = {k: v for k, v in rows.get(name, {}).items() if k != "error"} | row
    path.write_text(json.dumps({**result, **new, "rows": rows}, indent=1))


# -- output ---------------------------------------------------------------------------------------------------------------


def _line(result: dict[str, Any]) -> str:
    from _cpu_table import best_peer

    rows = result["rows"]
    name = f"{result.get('network')} batch {result.get('batch')} threads {result.get('threads')} {result.get('isa') or 'best'}"
    own, best = rows.get("ours", {}), best_peer(rows)
    if "seconds" not in own:
        return f"{name}: {own.get('error', 'memory only')}"
    beside = (
        "no peer" if best is None else f"{best} {rows[best]['seconds'] * 1e3:.2f} ms, ratio {rows[best]['ratio']:.2f}"
    )
    return f"{name}: ours {own['seconds'] * 1e3:.2f} ms; {beside}; {result['differ']} of {result['elements']} differ"


def show_table(folder: Path, write: bool) -> None:
    from _cpu_scaling import draw, section
    from _cpu_table import render

    grown = [_load(path) for path in sorted((folder / "scaling").glob("*.json"))]
    results = [_load(path) for path in sorted((folder / "results").glob("*.json"))]
    results = [r for result in results for r in (result if isinstance(result, list) else [result])]
    parts = [render([r for r in results if "machine" in r]), section(grown, str(PICTURE.relative_to(TABLE.parent)))]
    text = "\n\n".join(filter(None, parts)) + "\n"
    print(text)
    if write:
        if grown:
            draw(grown, PICTURE)
        TABLE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
