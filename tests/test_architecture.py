"""The rules of docs/architecture.md, held by a walk over the syntax trees; nothing is imported here.

A failure names the file, the line, the edge and the reason, so it can be mended without reading this file.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dcp_ckpt"
PROGRAMS = ("launch", "benchmarks")

# Lowest first: (units, why none of them may import a unit beside or above it).
LAYERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("bounded_calls", "closing", "errors", "forks", "hosts", "wording"),
        "everything closes, raises and says why, so these stand on nothing",
    ),
    (("other_names", "policies"), "policies are pure rules over numbers, other names a table"),
    (("config",), "settings are plain values, read by programs that never save or load"),
    (("format",), "the format is a pure function of bytes: a checkpoint can be read with it alone"),
    (
        ("storage", "store_channel", "observe"),
        "a storage knows keys and bytes, a channel messages, a sink events; none knows checkpoints",
    ),
    (
        ("state", "coordination", "lifecycle", "writer"),
        "each is one concern on its own; save and load put them together",
    ),
    (("save", "load", "stopping"), "one attempt each; none knows another or who decides when"),
    (("checkpointer", "runs", "ops", "dcp", "data"), "independent doors to the same machinery"),
    (("__init__",), "the public names, collected from below"),
    (
        ("cli", "integrations", "testing", "__main__"),
        "for users and their tests; the library never needs them",
    ),
    (("launch", "benchmarks"), "the first users of the package, who get what every user gets"),
)
LEVEL = {unit: level for level, (units, _) in enumerate(LAYERS) for unit in units}
REASON = {unit: reason for units, reason in LAYERS for unit in units}

# `__main__` is the command line under its other name.
FRIENDS = {("__main__", "cli")}

TORCH_UNITS = {
    "state", "save", "load", "checkpointer", "runs", "coordination", "dcp", "testing", "launch", "benchmarks",
    "store_channel", "data",
}  # fmt: skip
# They import it when they first read a tensor, so that the command line starts without it.
LAZY_TORCH_UNITS = {"integrations", "ops"}
OBJECT_STORE_PACKAGES = {"aiobotocore", "botocore", "fsspec", "s3fs"}
OBJECT_STORE_FOLDERS = ("dcp_ckpt/storage/objects/", "dcp_ckpt/testing/")
PUBLIC_SUBMODULES = {
    "dcp_ckpt.data", "dcp_ckpt.dcp", "dcp_ckpt.errors", "dcp_ckpt.integrations.tensorboard",
    "dcp_ckpt.testing",
}  # fmt: skip
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
MODULE_LINES_MAX = 449
FUNCTION_LINES_MAX = 60


@dataclass(frozen=True)
class Import:
    """One imported module: `target` is dotted, `name` what `from target import name` takes from it.

    `is_deferred`: importing the module does not run it, because it is in a function or under TYPE_CHECKING.
    """

    line: int
    target: str
    name: str | None
    is_deferred: bool


@dataclass(frozen=True)
class Module:
    path: Path

    @property
    def shown(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def unit(self) -> str:
        parts = self.path.relative_to(ROOT).with_suffix("").parts
        return parts[1] if parts[0] == PACKAGE else parts[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(), self.shown)

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        return tuple(self._imports())

    def _imports(self) -> Iterator[Import]:
        """Every import statement, also those inside of functions and under TYPE_CHECKING."""
        deferred = deferred_nodes(self.tree)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (Import(node.lineno, alias.name, None, node in deferred) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(self.path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
                target = ".".join(filter(None, (base, node.module)))
                yield from (Import(node.lineno, target, alias.name, node in deferred) for alias in node.names)


def deferred_nodes(tree: ast.Module) -> set[ast.AST]:
    """What does not run when the module is imported: everything in functions and under TYPE_CHECKING."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            found.update(inner for statement in node.body for inner in ast.walk(statement))
    return found


MODULES = tuple(
    Module(path) for folder in (PACKAGE, *PROGRAMS) for path in sorted((ROOT / folder).rglob("*.py"))
)
PACKAGE_MODULES = tuple(module for module in MODULES if module.shown.startswith(f"{PACKAGE}/"))
PROGRAM_MODULES = tuple(module for module in MODULES if module not in PACKAGE_MODULES)


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def imported_unit(found: Import) -> str | None:
    """The unit that an import reaches, or None for what is not ours."""
    top, *rest = found.target.split(".")
    if top in PROGRAMS:
        return top
    if top != PACKAGE:
        return None
    if rest:
        return rest[0]
    return found.name if found.name and is_module(f"{PACKAGE}.{found.name}") else "__init__"


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_every_unit_has_a_layer() -> None:
    unknown = sorted({module.unit for module in MODULES} - LEVEL.keys())
    report([f"{unit} is in no layer: give it one in LAYERS and in docs/architecture.md" for unit in unknown])


def test_imports_go_down_only() -> None:
    problems = []
    for module in MODULES:
        for found in module.imports:
            unit = imported_unit(found)
            if unit is None or unit == module.unit or (module.unit, unit) in FRIENDS:
                continue
            if unit not in LEVEL or LEVEL[unit] >= LEVEL.get(module.unit, 0):
                edge = f"{module.unit} -> {unit}"
                problems.append(
                    f"{module.shown}:{found.line}: {edge} does not go down: {REASON.get(module.unit)}"
                )
    report(problems)


def test_torch_stays_where_tensors_are() -> None:
    report(
        [
            f"{module.shown}:{found.line}: {module.unit} imports {found.target}: "
            f"only {sorted(TORCH_UNITS)} may, and {sorted(LAZY_TORCH_UNITS)} inside functions, "
            "so that the writer and the command line start at once"
            for module in MODULES
            if module.unit not in TORCH_UNITS
            for found in module.imports
            if found.target.split(".")[0] == "torch"
            and not (found.is_deferred and module.unit in LAZY_TORCH_UNITS)
        ]
    )


def test_one_package_knows_object_stores() -> None:
    report(
        [
            f"{module.shown}:{found.line}: imports {found.target}: only {OBJECT_STORE_FOLDERS[0]} may, "
            "so that its errors, retries and conditional writes are handled in one place"
            for module in PACKAGE_MODULES
            if not module.shown.startswith(OBJECT_STORE_FOLDERS)
            for found in module.imports
            if found.target.split(".")[0] in OBJECT_STORE_PACKAGES
        ]
    )


def test_programs_use_public_names_only() -> None:
    public = declared_names(Module(ROOT / PACKAGE / "__init__.py"))
    problems = []
    for module in PROGRAM_MODULES:
        for found in module.imports:
            if found.target.split(".")[0] != PACKAGE:
                continue
            full = f"{found.target}.{found.name}" if found.name else found.target
            if full in PUBLIC_SUBMODULES or found.target in PUBLIC_SUBMODULES:
                allowed = not (found.name or "").startswith("_")
            else:
                allowed = found.target == PACKAGE and (found.name is None or found.name in (public or ()))
            if not allowed:
                problems.append(
                    f"{module.shown}:{found.line}: {full} is not public: what a program of ours needs, "
                    f"users need; export it from {PACKAGE} or do without"
                )
    report(problems)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.shown)
def test_modules_are_small_and_named(module: Module) -> None:
    problems = []
    lines = len(module.path.read_text().splitlines())
    if lines > MODULE_LINES_MAX:
        problems.append(f"{module.shown} has {lines} lines, {MODULE_LINES_MAX} are allowed: split it by idea")
    if VAGUE_NAMES & set(module.path.relative_to(ROOT).with_suffix("").parts):
        problems.append(f"{module.shown}: the name does not say what belongs there")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = function_lines(node)
            if length > FUNCTION_LINES_MAX:
                problems.append(
                    f"{module.shown}:{node.lineno}: {node.name} has {length} lines without its docstring, "
                    f"{FUNCTION_LINES_MAX} are allowed"
                )
    report(problems)


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    length = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None and first.end_lineno is not None:
        length -= first.end_lineno - first.lineno + 1
    return length


@pytest.mark.parametrize("module", PACKAGE_MODULES, ids=lambda module: module.shown)
def test_public_names_are_declared_and_sorted(module: Module) -> None:
    names = declared_names(module)
    if names is None:
        defined = sorted(public_definitions(module.tree))
        assert not defined, f"{module.shown} defines {defined} and has no __all__"
    else:
        assert names == sorted(names, key=name_order), f"{module.shown}: __all__ is not sorted"


def declared_names(module: Module) -> list[str] | None:
    """The content of `__all__`, or None when the module has none."""
    for node in module.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            assert node.value is not None
            return list(ast.literal_eval(node.value))
    return None


def public_definitions(tree: ast.Module) -> set[str]:
    """Functions, classes and constants of a module that are not private by name."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return {name for name in found if not name.startswith("_")} - {"log"}


def name_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest: the order that ruff's RUF022 keeps."""
    if name.isupper():
        return 0, name
    return (1, name) if name[0].isupper() else (2, name)


def test_the_documented_layers_are_these() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| \d+ \| (.+?) \|", page, flags=re.MULTILINE)
    documented = [tuple(re.findall(r"`(\w+)`", row)) for row in reversed(rows)]
    assert documented == [units for units, _ in LAYERS], "docs/architecture.md and LAYERS differ"
    allowed = re.search(
        r"^Only (.+?) may\s+import\s+torch, and\s+(.+?)\s+only\s+inside\s+functions",
        page,
        flags=re.MULTILINE | re.DOTALL,
    )
    assert allowed is not None
    assert set(re.findall(r"`(\w+)`", allowed[1])) == TORCH_UNITS
    assert set(re.findall(r"`(\w+)`", allowed[2])) == LAZY_TORCH_UNITS
