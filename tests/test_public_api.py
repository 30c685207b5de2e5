"""What users may rely on: the exported names, a start without torch, and no pickle behind their back."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import dcp_ckpt

SOURCES = Path(dcp_ckpt.__path__[0])
TORCH_FREE = (
    "cli",
    "config",
    "errors",
    "format",
    "lifecycle",
    "observe",
    "ops",
    "policies",
    "storage",
    "writer",
)

IMPORT = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(set(sys.modules) & {"numpy", "torch"})))
"""


def heavy_imports(*names: str) -> list[str]:
    """Which of numpy and torch a fresh process has loaded after importing these modules."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *names], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def modules_of(unit: str) -> list[str]:
    """The dotted names of a unit: one module, or all modules of a folder."""
    single = SOURCES / f"{unit}.py"
    paths = [single] if single.exists() else sorted((SOURCES / unit).rglob("*.py"))
    parts = [("dcp_ckpt", *path.relative_to(SOURCES).with_suffix("").parts) for path in paths]
    return [".".join(part).removesuffix(".__init__") for part in parts if part[-1] != "__main__"]


def test_exported_names_are_sorted_and_unique() -> None:
    names = list(dcp_ckpt.__all__)
    assert names == sorted(set(names), key=lambda name: (not name.isupper(), not name[0].isupper(), name))


@pytest.mark.parametrize("name", dcp_ckpt.__all__)
def test_an_exported_name_exists_and_is_documented(name: str) -> None:
    value = getattr(dcp_ckpt, name)
    assert not isinstance(value, ModuleType), f"dcp_ckpt.{name} is hidden by the submodule of that name"
    assert (value.__doc__ or "").strip(), f"dcp_ckpt.{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dcp_ckpt.no_such_name


def test_exported_names_are_listed_by_dir() -> None:
    assert set(dcp_ckpt.__all__) <= set(dir(dcp_ckpt))


@pytest.mark.parametrize("name", ["dcp_ckpt", "dcp_ckpt.cli.main", "dcp_ckpt.writer"])
def test_programs_start_without_torch(name: str) -> None:
    assert heavy_imports(name) == []


def test_what_needs_no_tensors_never_loads_torch() -> None:
    assert heavy_imports(*(name for unit in TORCH_FREE for name in modules_of(unit))) == []


# The pool of test ranks talks to processes that it started itself; nothing that it loads was ever stored.
PICKLE_BETWEEN_OWN_PROCESSES = {SOURCES / "testing/ranks.py", SOURCES / "testing/rank_worker.py"}


@pytest.mark.parametrize(
    "path",
    sorted({*SOURCES.rglob("*.py")} - PICKLE_BETWEEN_OWN_PROCESSES),
    ids=lambda path: path.relative_to(SOURCES).as_posix(),
)
def test_no_pickle_is_loaded(path: Path) -> None:
    problems = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "pickle" and node.attr.lower() in ("load", "loads", "_load", "_loads"):
                problems.append(f"{path}:{node.lineno}: pickle.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module == "pickle":
            problems += [
                f"{path}:{node.lineno}: from pickle import {alias.name}"
                for alias in node.names
                if alias.name.startswith("load")
            ]
        elif isinstance(node, ast.keyword) and node.arg == "weights_only" and not is_true(node.value):
            problems.append(f"{path}:{node.value.lineno}: weights_only is not True")
    assert not problems, "\n".join(problems)


def is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True
