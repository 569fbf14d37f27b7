"""Which submodules a forward calls, and which it does more with, read from its source.

Needed where a module cannot be traced and its parts are to be fused on their own: a part may only be replaced if it is called and
nothing else. Everything that is not plainly a call (``getattr(self, …)``, ``self.children()``, a module passed on as an argument,
source that is not there) makes what it touches *opaque*: it is left as it is.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import fx, nn

Path = tuple[str, ...]
ANY = "*"
"""In a path: every child."""
SOME = "[:]"
"""In a path: a slice, which holds some of the children."""


def _position(key: int) -> str:
    """In a path: the child at a position, which need not be its name."""
    return f"[{key}]"


Passed = tuple[int, frozenset[str]]
"""How many arguments a call passes by position, and which by name."""


@dataclass(frozen=True)
class Use:
    """A use of the module at `path`: a call, or anything else (opaque).

    Attributes:
        passed: what a call passes; None where that cannot be read.
    """

    path: Path
    called: bool
    passed: Passed | None = None


def parts_of(
    module: nn.Module, inner: frozenset[Use] = frozenset()
) -> Iterator[tuple[str, nn.Module, frozenset[str] | None]]:
    """The largest submodules that are only called, by path, with the names of the arguments they are called with.

    Args:
        inner: uses of submodules by code outside this module.

    Returns:
        path, submodule, and the names; None where calls differ or cannot be read.
    """
    uses = _concrete(module, _own_uses(module)) | inner
    opaque = [use.path for use in uses if not use.called]
    called = {use.path for use in uses if use.called}
    for path in sorted(called):
        if any(path[: len(o)] == o for o in opaque):
            continue
        child = module.get_submodule(".".join(path))
        inside = frozenset(
            Use(use.path[len(path) :], use.called, use.passed)
            for use in uses
            if use.path[: len(path)] == path and len(use.path) > len(path)
        )
        if inside or type(child).forward is nn.Module.forward:
            for name, part, names in parts_of(child, inside):
                yield ".".join((*path, name)), part, names
        elif not any(path[: len(p)] == p and len(p) < len(path) for p in called):
            passed = {use.passed for use in uses if use.called and use.path == path}
            yield ".".join(path), child, _names(child, passed)


def _names(module: nn.Module, passed: set[Passed | None]) -> frozenset[str] | None:
    """The names of the arguments of `module`'s forward that its calls pass, if all pass the same."""
    call = next(iter(passed)) if len(passed) == 1 else None
    if call is None:
        return None
    count, keywords = call
    parameters = list(inspect.signature(module.forward).parameters)
    return frozenset(parameters[:count]) | keywords


def own_call(module: nn.Module) -> str | None:
    """Why calling `module` is something else than the forward of its class."""
    if "forward" in module.__dict__:
        return "its forward is replaced on the module itself"
    call = type(module).__call__
    # A GraphModule's is PyTorch's own wrapper, which only makes errors readable.
    if call is not nn.Module.__call__ and call.__module__ != fx.GraphModule.__module__:
        return f"{type(module).__name__} has a __call__ of its own"
    return None


def _own_uses(module: nn.Module) -> frozenset[Use]:
    if own_call(module):
        return frozenset({Use((), False)})
    if type(module).forward is nn.Sequential.forward:
        return frozenset({Use((ANY,), True, (1, frozenset()))})
    if type(module).forward is nn.Module.forward:
        return frozenset()
    return _uses(type(module))  # type: ignore[arg-type]


def _concrete(module: nn.Module, uses: frozenset[Use]) -> set[Use]:
    """The uses of modules that are there; a path through something else that holds modules makes those opaque."""
    found: set[Use] = set()
    for use in uses:
        todo: list[tuple[Path, Any, Path]] = [((), module, use.path)]
        while todo:
            path, value, rest = todo.pop()
            if isinstance(value, nn.Module):
                if not rest:
                    if path or not use.called:
                        found.add(Use(path, use.called, use.passed))
                elif rest[0] == SOME and rest[1:]:
                    todo.append((path, value, (ANY, *rest[2:])))
                elif rest[0] in (ANY, SOME):
                    todo += [((*path, name), child, rest[1:]) for name, child in value.named_children()]
                elif rest[0].startswith("["):
                    position = int(rest[0][1:-1])
                    todo += [
                        ((*path, name), child, rest[1:])
                        for i, (name, child) in enumerate(value._modules.items())
                        if i == position
                    ]
                elif rest[0] in value._modules:
                    todo.append(((*path, rest[0]), value._modules[rest[0]], rest[1:]))
                elif rest[0] in value._parameters or rest[0] in value._buffers:
                    found |= {Use(path, False)} if path else set()
                elif rest[0] in value.__dict__:
                    todo.append((path, value.__dict__[rest[0]], rest[1:]))
                elif path and len(rest) == 1 and not hasattr(nn.Module, rest[0]):  # a property or method of its own
                    inside = _concrete(value, _uses(type(value), rest[0]))  # type: ignore[arg-type]
                    found |= {Use((*path, *u.path), u.called, u.passed) for u in inside}
                elif path:
                    found.add(Use(path, False))
            else:
                held = {id(m) for m in _modules_in(value)}
                found |= {
                    Use(tuple(name.split(".")), False) for name, m in module.named_modules() if id(m) in held and name
                }
    return found


def _modules_in(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _modules_in(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from _modules_in(item)


@cache
def _uses(cls: type[nn.Module], start: str = "forward") -> frozenset[Use]:
    """Uses of ``self`` in a method of a class, and in every method of its own that this one reaches."""
    uses: set[Use] = set()
    todo, seen = [start], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for base in cls.__mro__:  # with those a method overrides: it may call them
            if base is nn.Module:
                break
            method: Any = base.__dict__.get(name)
            if method is None:
                continue
            getter: Any = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
            function = inspect.unwrap(getter)
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            except (OSError, TypeError, SyntaxError):
                return frozenset({Use((), False)})
            reader = _Reader(cls)
            definition = next(
                (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))), None
            )
            if definition is None:
                return frozenset({Use((), False)})
            reader.read(definition)
            uses |= reader.uses
            todo += reader.methods
    return frozenset(uses)


_ITERATORS = {"enumerate", "reversed", "zip", "iter"}
_CHILDREN = {
    "items": ("name", "child"),
    "named_children": ("name", "child"),
    "values": ("child",),
    "children": ("child",),
    "keys": ("name",),
}
"""Methods of a module or its ``_modules`` to loop over, and what the loop's variables are."""
_QUESTIONS = {"len", "isinstance", "hasattr", "type", "id", "bool"}


class _Reader:
    """Reads one method: follows names that stand for ``self``'s submodules through assignments and loops."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.uses: set[Use] = set()
        self.methods: list[str] = []
        self.aliases: dict[str, set[Path]] = {}
        self.understood: set[int] = set()  # expressions whose use is accounted for

    def read(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        arguments = [*function.args.posonlyargs, *function.args.args]
        if not arguments:
            self.uses.add(Use((), False))
            return
        self.aliases[arguments[0].arg] = {()}
        before = -1
        while before != sum(map(len, self.aliases.values())):  # until no name stands for anything new
            before = sum(map(len, self.aliases.values()))
            for node in ast.walk(function):
                self._bind(node)
        for node in ast.walk(function):
            self._use(node)

    # -- names ----------------------------------------------------------------------------------------------------------------

    def paths(self, node: ast.AST) -> set[Path]:
        """What an expression can stand for, as paths from ``self``; empty: nothing of ``self``."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, set())
        if isinstance(node, ast.Attribute):
            owners = self.paths(node.value)
            return owners if node.attr == "_modules" else {(*p, node.attr) for p in owners}
        if isinstance(node, ast.Subscript):
            key = node.slice.value if isinstance(node.slice, ast.Constant) else None
            step = SOME if isinstance(node.slice, ast.Slice) else ANY
            if isinstance(key, str):
                step = key
            elif isinstance(key, int) and key >= 0:
                step = _position(key)
            return {(*p, step) for p in self.paths(node.value)}
        return set()

    def _elements(self, node: ast.AST) -> list[set[Path]]:
        """What each variable of a loop over `node` stands for."""
        if isinstance(node, ast.Call):
            self.understood.add(id(node))
            if isinstance(node.func, ast.Name) and node.func.id in _ITERATORS:
                inner = [e for a in node.args for e in self._elements(a)]
                return [set(), *inner] if node.func.id == "enumerate" else inner
            if isinstance(node.func, ast.Attribute) and node.func.attr in _CHILDREN:
                elements = {(*p, ANY) for p in self.paths(node.func.value)}
                self._understand(node.func)
                return [elements if kind == "child" else set() for kind in _CHILDREN[node.func.attr]]
            self.understood.discard(id(node))
            return [set()]
        self._understand(node)
        return [{(*p, ANY) for p in self.paths(node)}]

    def _understand(self, node: ast.AST) -> None:
        for inner in ast.walk(node):
            self.understood.add(id(inner))

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            self._assign(node.target, self._elements(node.iter))
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                values: list[ast.AST] = [node.value]
                if isinstance(target, (ast.Tuple, ast.List)) and isinstance(node.value, (ast.Tuple, ast.List)):
                    values = list(node.value.elts)
                if isinstance(target, ast.Name) or (
                    isinstance(target, (ast.Tuple, ast.List)) and len(values) == len(target.elts)
                ):
                    for value in values:
                        if self.paths(value):
                            self._understand(value)
                    self._assign(target, [self.paths(value) for value in values])

    def _assign(self, target: ast.AST, values: list[set[Path]]) -> None:
        if isinstance(target, ast.Name):
            for paths in values[:1]:
                if paths:
                    self.aliases.setdefault(target.id, set()).update(paths)
        elif isinstance(target, (ast.Tuple, ast.List)):
            # enumerate(zip(a, b)): (i, (x, y)) has its variables in the order of the elements
            names = [n for n in ast.walk(target) if isinstance(n, ast.Name)]
            if len(names) == len(values):
                for name, paths in zip(names, values, strict=True):
                    self._assign(name, [paths])
            else:
                for paths in values:
                    self.uses |= {Use(p, False) for p in paths}

    # -- uses -----------------------------------------------------------------------------------------------------------------

    def _ask(self, node: ast.AST) -> None:
        """An expression of which only the truth is asked."""
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self._ask(value)
        elif isinstance(node, ast.UnaryOp):
            self._ask(node.operand)
        elif not isinstance(node, ast.Call):
            self._understand_names(node)

    def _understand_names(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Attribute, ast.Subscript, ast.Name)) and self.paths(node):
            self._properties(node)
            self._understand(node)

    def _properties(self, node: ast.AST) -> None:
        self.methods += [
            p[0] for p in self.paths(node) if len(p) == 1 and isinstance(getattr(self.cls, p[0], None), property)
        ]

    def _use(self, node: ast.AST) -> None:
        if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
            self._ask(node.test)
        elif isinstance(node, ast.Compare):
            for value in (node.left, *node.comparators):
                self._understand_names(value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _QUESTIONS:
            for value in node.args:
                self._understand_names(value)
        elif isinstance(node, ast.Call) and id(node) not in self.understood:
            for path in self.paths(node.func):
                if path and path[-1] in _CHILDREN:
                    self.uses.add(Use(path[:-1], False))
                elif len(path) == 1 and callable(getattr(self.cls, path[0], None)):
                    if hasattr(nn.Module, path[0]):  # children(), modules(), __call__ …: can reach anything
                        self.uses.add(Use((), False))
                    else:
                        self.methods.append(path[0])
                elif len(path) > 1 and hasattr(nn.Module, path[-1]):  # a method of a submodule: .forward(), .children()
                    self.uses.add(Use(path[:-1], False))
                elif path:
                    self.uses.add(Use(path, True, _passed(node)))
                else:
                    self.uses.add(Use((), False))
            if self.paths(node.func):
                self._understand(node.func)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
            self._understand(node)  # self.flag = ...: what is stored is read for itself
        elif isinstance(node, (ast.Attribute, ast.Subscript, ast.Name)) and id(node) not in self.understood:
            if isinstance(node.ctx, ast.Load) and not _is_super(node):
                paths = self.paths(node)
                if paths:
                    self._properties(node)
                    self._understand(node)
                    methods = {p for p in paths if len(p) == 1 and callable(getattr(self.cls, p[0], None))}
                    self.uses |= {Use(() if p in methods else p, False) for p in paths if not self._is_constant(p)}

    def _is_constant(self, path: Path) -> bool:
        """An attribute of the class that is neither a module nor leads to one."""
        value = getattr(self.cls, path[0], None) if len(path) == 1 else None
        return isinstance(value, (property, int, float, str, tuple)) or path in (("training",),)


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "super"


def _passed(call: ast.Call) -> Passed | None:
    names = [k.arg for k in call.keywords]
    if any(isinstance(a, ast.Starred) for a in call.args) or None in names:
        return None
    return len(call.args), frozenset(n for n in names if n is not None)
