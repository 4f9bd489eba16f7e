"""The house rules that a reader relies on, read from the source with ast: nothing is imported or run.

    launcher ─▶ runtime ─▶ ckpt ─▶ proto        an import may point right, or stay; never left
    pure modules                                reach no torch, grpc, socket, time, os, threading, subprocess
    every module                                opens with a docstring; 400 lines, functions 60 (else Long:)
    the packages                                no time.sleep, no pickle, no handler that hides any error

Each rule is a function of one module that lists what breaks it. The first half of this file shows each rule
a module that breaks it, so that a rule which finds nothing any more is itself found.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
ORDER: Final = ("launcher", "runtime", "ckpt", "proto")
LINES_MAX: Final = 400
FUNCTION_LINES_MAX: Final = 60
IMPURE: Final = frozenset({"torch", "grpc", "socket", "time", "os", "threading", "subprocess"})
PICKLES: Final = frozenset({"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal"})
EVERYTHING: Final = frozenset({"Exception", "BaseException"})
PURE: Final = (
    *sorted(f"holdfast.proto.{path.stem}" for path in (ROOT / "proto").glob("[!_]*.py")),
    "holdfast.ckpt.pieces",
    "holdfast.ckpt.memory.placement",
    "holdfast.ckpt.memory.redundancy",
    "holdfast.ckpt.memory.stripes",
    "holdfast.runtime.cut",
    "holdfast.runtime.pipeline.blocks",
    "holdfast.runtime.pipeline.planner",
    "holdfast.runtime.pipeline.schedule",
    "holdfast.runtime.pipeline.swap",
    "holdfast.runtime.pipeline.weave",
    "holdfast.runtime.recovery.decide",
    "holdfast.runtime.recovery.ladder",
    "holdfast.runtime.recovery.neighbours",
    "holdfast.launcher.membership",
    "holdfast.launcher.council",
    "holdfast.launcher.hosts",
    "holdfast.launcher.job",
    "holdfast.launcher.detector",
)

Names = list[tuple[str, ast.AST]]


@dataclass(frozen=True)
class Module:
    """One source file: its import name, whether it is a package's __init__, its text."""

    name: str
    text: str
    path: str = "example.py"
    package: bool = False

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def root(self) -> str:
        """`runtime` of holdfast.runtime.x; empty for an example."""
        parts = self.name.split(".")
        return parts[1] if parts[0] == "holdfast" and len(parts) > 1 else ""

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


def packages() -> list[Module]:
    """Every module of the four packages; generated code is not ours to judge."""
    return [
        _read(path, f"holdfast.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}")
        for root in ORDER
        for path in sorted((ROOT / root).rglob("*.py"))
        if path.parent != ROOT / "proto" / "gen"
    ]


def examples() -> list[Module]:
    return [_read(path, path.stem) for path in sorted((ROOT / "examples").glob("*.py"))]


def _read(path: Path, name: str) -> Module:
    package = path.name == "__init__.py"
    shown = str(path.relative_to(ROOT))
    return Module(name.removesuffix(".__init__"), path.read_text(encoding="utf-8"), shown, package)


# ---- what a module imports ------------------------------------------------------------------------------


def imported(module: Module, nodes: Iterator[ast.AST] | None = None) -> Names:
    """Absolute names that the module imports, anywhere in it, by any spelling that ast can see."""
    found: Names = []
    for node in ast.walk(module.tree) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _resolved(module, node)
            found += [(f"{base}.{alias.name}".strip("."), node) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            target = node.args[0] if node.args else None
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                found.append((target.value, node))
    return found


def _resolved(module: Module, node: ast.ImportFrom) -> str:
    """What `from ..x` stands for in this module."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    up = node.level - (1 if module.package else 0)
    parts = parts[: len(parts) - up] if up else parts
    return ".".join([*parts, *([node.module] if node.module else [])])


def at_import(module: Module) -> Iterator[ast.AST]:
    """Statements that run when the module is imported: no function bodies, nothing under TYPE_CHECKING."""
    waiting: list[ast.AST] = [module.tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


# ---- the rules --------------------------------------------------------------------------------------------


def points_left(module: Module) -> list[str]:
    """Imports of a package that comes before the module's own, type-only ones included."""
    found = []
    for name, node in imported(module):
        parts = name.split(".")
        target = parts[1] if parts[0] == "holdfast" and len(parts) > 1 else ""
        if target in ORDER and ORDER.index(target) < ORDER.index(module.root):
            found.append(module.at(node, f"{module.root} imports {name}"))
    return sorted(set(found))


def spelt_wrong(module: Module) -> list[str]:
    """Imports not relative inside a package and absolute across: mypy would see two of each class."""
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom):
            inside = _resolved(module, node).split(".")[:2] == ["holdfast", module.root]
            if inside != bool(node.level):
                rule = "relative inside a package" if inside else "absolute across packages"
                found.append(module.at(node, f"{ast.unparse(node)}: imports are {rule}"))
    return found


def impurities(module: Module) -> list[str]:
    """Imports, anywhere in the module, of what a pure module does without."""
    return [module.at(node, f"imports {name}") for name, node in imported(module) if name.split(".")[0] in IMPURE]


def reached_impurities(start: Module, known: dict[str, Module]) -> list[str]:
    """Impure modules that importing `start` runs into through ours, packages' __init__ included."""
    waiting, seen, found = [start.name], set(), []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        waiting += [parent for parent in [name.rpartition(".")[0]] if parent in known]
        for target, node in imported(known[name], at_import(known[name])):
            if target.split(".")[0] in IMPURE:
                found.append(known[name].at(node, f"{start.name} reaches {target} through {name}"))
            # `from x import y` may name a module x.y or something in x.
            waiting += [owner for owner in (target, target.rpartition(".")[0]) if owner in known]
    return found


def undocumented(module: Module) -> list[str]:
    return [] if ast.get_docstring(module.tree) else [module.at(module.tree, "does not open with a docstring")]


def too_long(module: Module) -> list[str]:
    """Files and functions beyond the limit, unless the module's docstring argues for it after `Long:`."""
    if "Long:" in (ast.get_docstring(module.tree) or ""):
        return []
    lines = len(module.text.splitlines())
    found = [module.at(module.tree, f"{lines} lines, at most {LINES_MAX}")] if lines > LINES_MAX else []
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES_MAX:
                found.append(module.at(node, f"{node.name} has {length} lines, at most {FUNCTION_LINES_MAX}"))
    return found


def hidden_errors(module: Module) -> list[str]:
    """`except Exception: pass` in any spelling: nothing but pass, ... or continue, or suppress(Exception)."""
    found = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            names = {ast.unparse(n) for n in ast.walk(node.type)} if node.type is not None else EVERYTHING
            if names & EVERYTHING and all(_does_nothing(statement) for statement in node.body):
                found.append(module.at(node, "a handler of every error that does nothing"))
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("suppress")
            and {ast.unparse(argument) for argument in node.args} & EVERYTHING
        ):
            found.append(module.at(node, "suppresses every error"))
    return found


def _does_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, (ast.Pass, ast.Continue))


def sleeps(module: Module) -> list[str]:
    called = [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]
    found = [module.at(node, "time.sleep") for node in called if ast.unparse(node.func) == "time.sleep"]
    return found + [module.at(node, name) for name, node in imported(module) if name == "time.sleep"]


def pickles(module: Module) -> list[str]:
    return [module.at(node, f"imports {name}") for name, node in imported(module) if name.split(".")[0] in PICKLES]


# ---- each rule finds what it is for -----------------------------------------------------------------------

Rule = Callable[[Module], list[str]]


def _broken(text: str, name: str = "holdfast.ckpt.memory.arena") -> Module:
    return Module(name, text)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (points_left, "from holdfast.runtime.trainer import Trainer"),
        (points_left, "import holdfast.launcher.agent"),
        (points_left, "from holdfast import launcher"),
        (points_left, "from ...runtime import trainer"),
        (points_left, "def f():\n    from holdfast.runtime import rng"),
        (points_left, "import importlib\nimportlib.import_module('holdfast.runtime.rng')"),
        (spelt_wrong, "from holdfast.ckpt import pieces"),
        (spelt_wrong, "from ...proto import plan"),
        (impurities, "import time"),
        (impurities, "from os.path import join"),
        (impurities, "def f():\n    import torch.distributed"),
        (undocumented, "import ast"),
        (too_long, "x = 1\n" * (LINES_MAX + 1)),
        (too_long, "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX),
        (hidden_errors, "try:\n    f()\nexcept Exception:\n    pass"),
        (hidden_errors, "try:\n    f()\nexcept:\n    ..."),
        (
            hidden_errors,
            "while 1:\n    try:\n        f()\n    except (OSError, BaseException):\n        continue",
        ),
        (hidden_errors, "with contextlib.suppress(Exception):\n    f()"),
        (sleeps, "import time\ntime.sleep(1)"),
        (sleeps, "from time import sleep\nsleep(1)"),
        (pickles, "import pickle"),
        (pickles, "from cloudpickle import dumps"),
    ],
)
def test_a_module_that_breaks_a_rule_is_found(rule: Rule, text: str) -> None:
    assert len(rule(_broken(text))) >= 1


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (points_left, "from holdfast.proto.plan import Plan\nfrom ..pieces import Box\nimport torch"),
        (spelt_wrong, "from holdfast.proto.plan import Plan\nfrom ..pieces import Box\nfrom . import digest"),
        (impurities, "import math\nfrom holdfast.proto.ids import Rank"),
        (too_long, '"""A table. Long: one line per name."""\n' + "x = 1\n" * LINES_MAX),
        (too_long, "def f():\n" + "    x = 1\n" * (FUNCTION_LINES_MAX - 1)),
        (hidden_errors, "try:\n    f()\nexcept FileNotFoundError:\n    pass"),
        (hidden_errors, "try:\n    f()\nexcept Exception as error:\n    report(error)"),
        (sleeps, "event.wait(1.0)"),
        (pickles, "import json"),
    ],
)
def test_a_module_that_keeps_a_rule_is_not_found(rule: Rule, text: str) -> None:
    assert rule(_broken(text)) == []


def test_an_impurity_behind_another_module_is_found_but_not_one_that_importing_does_not_run() -> None:
    pure = _broken("from .other import f", "holdfast.ckpt.pieces")
    other = _broken("def f():\n    import torch\n", "holdfast.ckpt.other")
    package = Module("holdfast.ckpt", "from typing import TYPE_CHECKING\n", package=True)
    known = {module.name: module for module in (pure, other, package)}
    assert reached_impurities(pure, known) == []
    known["holdfast.ckpt"] = Module(
        "holdfast.ckpt", "if TYPE_CHECKING:\n    import os\nelse:\n    import time", package=True
    )
    assert reached_impurities(pure, known) == ["example.py:4: holdfast.ckpt.pieces reaches time through holdfast.ckpt"]
    known["holdfast.ckpt.other"] = _broken("import torch", "holdfast.ckpt.other")
    assert len(reached_impurities(pure, known)) == 2


# ---- the house keeps them ---------------------------------------------------------------------------------


def test_the_source_is_found() -> None:
    assert {module.root for module in packages()} == set(ORDER)
    assert "pretrain" in {module.name for module in examples()}


@pytest.mark.parametrize("rule", [points_left, spelt_wrong, hidden_errors, sleeps, pickles], ids=lambda r: r.__name__)
def test_the_packages_keep(rule: Rule) -> None:
    _nothing([line for module in packages() for line in rule(module)])


@pytest.mark.parametrize("rule", [undocumented, too_long], ids=lambda r: r.__name__)
def test_the_packages_and_examples_keep(rule: Rule) -> None:
    _nothing([line for module in packages() + examples() for line in rule(module)])


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_stays_pure(name: str) -> None:
    known = {module.name: module for module in packages()}
    if name not in known:
        pytest.fail(f"{name} is listed as pure and not there; if it was renamed, rename it here", pytrace=False)
    _nothing(impurities(known[name]) + reached_impurities(known[name], known))


def _nothing(found: list[str]) -> None:
    """Fail with one line per finding: pytest would cut a long list."""
    if found:
        pytest.fail("\n".join(found), pytrace=False)
