"""The documentation is held to what is there: links, commands, features, and a site that builds.

That its commands and examples run is tested in `test_docs_examples.py` and, for what needs ranks or S3,
`distributed/test_documented_commands.py`. What nobody runs is in `NOT_CODE` here and in `NOT_RUN` there.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import dcp_ckpt
from dcp_ckpt.integrations.tensorboard import TensorBoardSink
from launch.options import parse_options
from tests.cli.commands import invoke
from tests.pages import PAGES, ROOT, blocks_of, commands_in, prose_of

NOT_CODE = {
    ("README.md", "text"): "the last lines of `make demo`",
    ("docs/format.md", ""): "a picture of a run's directory",
    ("docs/s3.md", "json"): "permissions to give to AWS",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
FEATURES = "docs/features.md"


def anchors(page: str) -> set[str]:
    """The fragments that a page's headings can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page: str) -> None:
    problems = []
    for _, link in LINK.findall(prose_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not target.exists():
            problems.append(f"{link}: there is no such file")
        elif anchor and anchor not in anchors(target.relative_to(ROOT).as_posix()):
            problems.append(f"{link}: there is no such heading")
    assert not problems, f"{page}: {problems}"


def commands_of(page: str) -> Iterator[list[str]]:
    """The words of each command on a page: in its bash blocks, and in its sentences and tables."""
    for block in blocks_of(page, "bash"):
        yield from commands_in(block)
    for span in SPAN.findall(prose_of(page)):
        if re.match(r"(dcp-ckpt|make|torchrun|launch/train\.py) ", span):
            yield shlex.split(span)


def named(program: str) -> list[list[str]]:
    """All commands of all pages that call a program."""
    return [words for page in PAGES for words in commands_of(page) if words[0] == program]


@cache
def help_of_command(*command: str) -> str:
    shown = invoke(*command, "--help")
    assert shown.exit_code == 0, f"dcp-ckpt {' '.join(command)}: {shown.output}"
    return shown.output


@cache
def help_of_driver() -> str:
    with redirect_stdout(StringIO()) as shown, pytest.raises(SystemExit):
        parse_options(["--help"])
    return shown.getvalue()


def unknown_flags(words: list[str], shown: str) -> list[str]:
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [flag for flag in flags if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", shown)]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = {word for words in named("make") for word in words[1:] if "=" not in word}
    assert used, "the README names no make target: how does a newcomer start?"
    assert used <= targets, f"not in the Makefile: {sorted(used - targets)}"


def test_programs_know_their_flags() -> None:
    for words in named("torchrun") + named("launch/train.py"):
        position = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script = words[position]
        if script == "run.py":  # the example of the quickstart
            continue
        known = help_of_driver() if script == "launch/train.py" else (ROOT / script).read_text()
        unknown = unknown_flags(words[position + 1 :], known)
        assert not unknown, f"{script} does not know {unknown}"


def test_subcommands_exist_and_know_their_flags() -> None:
    for words in named("dcp-ckpt"):
        command = [] if words[1].startswith("-") else words[1:2]
        unknown = unknown_flags(words[1:], help_of_command(*command))
        assert not unknown, f"dcp-ckpt {words[1]} does not know {unknown}"


def test_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    used = {extra for page in PAGES for extra in re.findall(r"\.\[(\w+)\]", (ROOT / page).read_text())}
    assert used, "no page says how to install what S3 needs"
    assert used <= extras.keys()


def test_what_is_no_code_has_a_reason() -> None:
    languages = {(page, block.language) for page in PAGES for block in blocks_of(page)}
    assert {pair for pair in languages if pair[1] not in ("bash", "python")} == NOT_CODE.keys()


def feature_rows() -> list[tuple[str, str, str]]:
    """What can be done, by what, and what shows it."""
    lines = (ROOT / FEATURES).read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return [(feature, means, proof) for feature, means, proof in rows if feature != "what you can do"]


def test_every_feature_has_a_test() -> None:
    for feature, _, proof in feature_rows():
        links = LINK.findall(proof)
        assert links, f"{feature}: no test shows it"
        for name, path in links:
            source = (ROOT / "docs" / path).read_text()
            assert re.search(rf"^def {name}\(", source, flags=re.MULTILINE), (
                f"{feature}: {path} has no {name}"
            )


def test_every_feature_has_a_command_or_a_call() -> None:
    """Commands are checked with those of all pages; of Python, each name and keyword has to be there."""
    for feature, means, _ in feature_rows():
        spans = SPAN.findall(means)
        assert spans, f"{feature}: by what?"
        for span in spans:
            if not re.match(r"(dcp-ckpt|make|torchrun|launch/train\.py) ", span):
                problem = unknown_name(ast.parse(span))
                assert problem is None, f"{feature}: {span}: {problem}"


def unknown_name(tree: ast.AST) -> str | None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            function = public_callables().get(name)
            if function is None:
                return f"there is no {name}"
            known = inspect.signature(function).parameters
            unknown = [keyword.arg for keyword in node.keywords if keyword.arg not in known]
            if unknown:
                return f"{name} has no {unknown}"
    return None


@cache
def public_callables() -> dict[str, Any]:
    """Public functions and classes, and the methods of these, by name."""
    public = {name: getattr(dcp_ckpt, name) for name in dcp_ckpt.__all__}
    public["TensorBoardSink"] = TensorBoardSink
    methods = {
        name: value
        for owner in public.values()
        if inspect.isclass(owner)
        for name, value in vars(owner).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
    return methods | public


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "site/api/index.html").read_text()
    missing = [name for name in dcp_ckpt.__all__ if not re.search(rf'id="dcp_ckpt\.[\w.]*{name}"', api)]
    assert not missing, f"not in docs/api.md: {missing}"
    assert "dcp-ckpt-verify" in (tmp_path / "site/cli/index.html").read_text()
