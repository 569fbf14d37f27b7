"""The package as a whole: what importing it costs, what it needs, and which way its imports run."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import horizon_plugin_pytorch as horizon

PACKAGE = "horizon_plugin_pytorch"
SRC = Path(horizon.__file__).parents[1]


def run_python(code: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- what importing costs -----------------------------------------------------------------------------------------------------


def test_importing_adds_little_to_importing_torch() -> None:
    code = "import time, torch; t = time.perf_counter(); import horizon_plugin_pytorch; print(time.perf_counter() - t)"
    best = float("inf")
    for _ in range(5):  # the best of several: other programs run, too
        best = min(best, float(run_python(code)))
        if best <= 0.3:
            break
    assert best <= 0.3


def test_importing_imports_nothing_else() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import horizon_plugin_pytorch as horizon
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)))
"""
    assert run_python(code).strip() == f"['{PACKAGE}']"


def test_importing_needs_no_torch_before_it_is_used() -> None:
    assert run_python(f"import sys, {PACKAGE}; print('torch' in sys.modules)").strip() == "False"


def test_fusing_imports_only_what_it_needs() -> None:
    code = """
import sys, torch
from torch import nn
before = set(sys.modules)
import horizon_plugin_pytorch as horizon
net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval()
horizon.quantization.fuse_modules(net, ["0", "1", "2"])
report = horizon.quantization.fuse_fx(net).fusion_report
report.to_json()
heavy = {"torchvision", "rich", "typer", "click", "jinja2", "onnx", "safetensors", "skimage", "PIL", "scipy", "torch.ao.quantization",
         "torch._dynamo", "torch._inductor", "torch.onnx", "torch.export"}
print(sorted(heavy & (set(sys.modules) - before)))
"""
    assert run_python(code).strip() == "[]"


def test_public_names() -> None:
    assert set(dir(horizon)) >= {"fusion", "nn", "qat_mode", "quantization", "utils", "FusionError"}
    for name in dir(horizon):
        assert getattr(horizon, name) is not None
    for module in (horizon.fusion, horizon.quantization, horizon.utils):
        for name in dir(module):
            assert getattr(module, name) is not None, f"{module.__name__}.{name}"
    with pytest.raises(AttributeError, match="has no attribute 'fuze'"):
        _ = horizon.fuze


DOCUMENTED = {
    "quantization": "fuse_known_modules fuse_modules fuse_modules_qat fuse_fx absorb_bn QuantStub DeQuantStub",
    "fusion": "analyze register_activation register_anchor FusionReport fuse_fx",
    "utils.quant_profiler": "check_unfused_operations",
    "qat_mode": "QATMode set_qat_mode get_qat_mode",
    "nn.intrinsic": "ConvReLU2d ConvBN2d ConvAdd2d ConvAddReLU2d ConvBNAddReLU62d ConvTransposeReLU2d LinearReLU",
    "nn.quantized": "FloatFunctional",
}


def test_documented_names_survive_every_import() -> None:
    """A submodule of the same name would hide a function as soon as something imports it."""
    code = f"""
import importlib, pkgutil
import {PACKAGE} as horizon
for info in pkgutil.walk_packages(horizon.__path__, "{PACKAGE}."):
    if ".cli" not in info.name and not info.name.endswith(".demo"):
        importlib.import_module(info.name)
for module, names in {DOCUMENTED!r}.items():
    for name in names.split():
        if not callable(getattr(importlib.import_module(f"{PACKAGE}.{{module}}"), name)):
            print(module, name)
"""
    assert run_python(code).strip() == ""


def test_it_is_typed_and_has_a_version() -> None:
    assert (SRC / PACKAGE / "py.typed").exists()
    assert horizon.__version__.count(".") >= 2


# -- PyTorch without torch.ao -------------------------------------------------------------------------------------------------

WITHOUT_TORCH_AO = """
import sys, torch, torch.fx
from torch import nn

GONE = ("torch.ao", "torch.quantization", "torch.nn.quantized", "torch.nn.intrinsic", "torch.nn.qat", "torch.nn.quantizable")

class Gone:
    def find_spec(self, name, path=None, target=None):
        if any(name == g or name.startswith(g + ".") for g in GONE):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in [n for n in sys.modules if any(n == g or n.startswith(g + ".") for g in GONE)]:
    del sys.modules[name]
for owner, name in ((torch, "ao"), (torch, "quantization"), *((nn, n) for n in ("quantized", "intrinsic", "qat", "quantizable"))):
    if name in vars(owner):
        delattr(owner, name)
sys.meta_path.insert(0, Gone())
try:
    import torch.ao
    raise SystemExit("torch.ao is still there")
except ModuleNotFoundError:
    pass

import horizon_plugin_pytorch as horizon
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization import DeQuantStub, QuantStub

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = QuantStub(), DeQuantStub()
        self.conv, self.bn, self.ff, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), FloatFunctional(), nn.ReLU()

    def forward(self, x):
        x = self.quant(x)
        return self.dequant(self.relu(self.ff.add(x, self.bn(self.conv(x)))))

net = Net().eval()
net.bn.running_mean.normal_()
net.bn.running_var.uniform_(0.5, 2)
x = torch.randn(2, 3, 4, 4)
names = ["conv", "bn", "ff", "relu"]
q = horizon.quantization
fused = {
    "fuse_modules": q.fuse_modules(net, names),
    "fuse_modules_qat": q.fuse_modules_qat(net, names),
    "absorb_bn": q.absorb_bn(q.fuse_modules_qat(net, names)),
    "fuse_fx": q.fuse_fx(net),
    "fuse_fx, kept": q.fuse_fx(net, is_qat=True, example_inputs=x),
}
for name, model in fused.items():
    assert type(model.ff).__name__.startswith("Conv"), name
    assert (model(x) - net(x)).abs().max() < 1e-5, name
    model.load_state_dict(net.state_dict())
    assert (model(x) - net(x)).abs().max() < 1e-5, name
assert horizon.utils.quant_profiler.check_unfused_operations(net, x, False) == [["conv", "bn", "ff", "relu"]]
assert not any(n.startswith(GONE) for n in sys.modules)
print("done")
"""


def test_it_works_without_torch_ao() -> None:
    assert run_python(WITHOUT_TORCH_AO).strip() == "done"


# -- which way imports run ----------------------------------------------------------------------------------------------------

ROWS = [
    ("errors", "_lazy", "backends"),
    ("fusion.patterns",),
    ("fusion.absorb_bn",),
    ("nn",),
    ("qat_mode",),
    ("fusion",),
    ("quantization", "plan"),
    ("export", "analysis", "utils"),
    ("demo",),
    ("cli",),
    ("",),
]
"""From the ground up; a module imports from the rows below its own and from its own package. More exact names come first."""


def module_name(file: Path) -> str:
    parts = list(file.relative_to(SRC / PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted((SRC / PACKAGE).rglob("*.py"))}


def imports(tree: ast.Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """Those that run when the module is imported: not in functions, not for type checkers only."""
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)


def imported(module: str, node: ast.Import | ast.ImportFrom) -> list[str]:
    """Full names of what an import statement imports; of ``from a import b`` both ``a.b`` and ``a`` are possible."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = [PACKAGE, *filter(None, module.split("."))]
        if FILES[module].name != "__init__.py":
            package.pop()
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def arrows() -> dict[str, set[str]]:
    """From each module to those of this package that importing it imports."""
    result: dict[str, set[str]] = {}
    for module, file in FILES.items():
        targets = set()
        for node in imports(ast.parse(file.read_text())):
            for name in imported(module, node):
                if name == PACKAGE or name.startswith(f"{PACKAGE}."):
                    inner = name.removeprefix(PACKAGE).removeprefix(".")
                    targets.add(inner if inner in FILES else inner.rpartition(".")[0])
        result[module] = targets - {module}
    return result


def place(module: str) -> tuple[int, str]:
    """Row and package of a module."""
    for row, packages in enumerate(ROWS):
        for package in packages:
            if module == package or (package and module.startswith(f"{package}.")):
                return row, package
    raise AssertionError(f"{module} is in no row of the table: where does it belong?")


def test_there_are_arrows_to_look_at() -> None:
    drawn = arrows()
    assert len(drawn) > 30
    assert "fusion.patterns" in drawn["nn.intrinsic"] and "nn.intrinsic.assemble" in drawn["fusion.by_name"]


def test_no_arrow_runs_back() -> None:
    back = []
    for module, targets in arrows().items():
        row, package = place(module)
        for target in targets:
            target_row, target_package = place(target)
            if target_row > row or (target_row == row and target_package != package):
                back.append(f"{module} -> {target}")
    assert not back


def test_the_reference_stands_on_the_ground() -> None:
    """Not even a function of it imports the rest of the package."""
    for module, file in FILES.items():
        if module.startswith("backends.reference"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    for name in imported(module, node):
                        assert not name.startswith(PACKAGE) or name.startswith(f"{PACKAGE}.backends.reference"), (
                            f"{module}: {name}"
                        )


def test_no_cycles() -> None:
    drawn, done, path = arrows(), set[str](), list[str]()

    def visit(module: str) -> None:
        if module in path:
            raise AssertionError(" -> ".join([*path[path.index(module) :], module]))
        if module not in done:
            path.append(module)
            for target in sorted(drawn[module]):
                visit(target)
            path.pop()
            done.add(module)

    for module in drawn:
        visit(module)


def test_nothing_imports_torch_ao_when_it_is_imported() -> None:
    """PyTorch is dropping it. What is used of it is recognized by name or imported where it is used."""
    gone = ("torch.ao", "torch.quantization", "torch.nn.quantized", "torch.nn.intrinsic", "torch.nn.qat")
    found = [
        f"{module}: {name}"
        for module, file in FILES.items()
        for node in imports(ast.parse(file.read_text()))
        for name in imported(module, node)
        if name.startswith(gone)
    ]
    assert not found
