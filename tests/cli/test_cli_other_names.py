"""Words that people know from other programs are answered with the ones to use here."""

from __future__ import annotations

import json

import click
import pytest

from dcp_ckpt.cli import other_names
from dcp_ckpt.cli.main import cli
from tests.cli.commands import invoke


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("prune r --save-total-limit 3", "There is no --save-total-limit; here it is --keep-last."),
        ("prune r --max_to_keep=3", "There is no --max_to_keep; here it is --keep-last."),
        ("prune r --keep_latest_k 3", "There is no --keep_latest_k; here it is --keep-last."),
        ("prune r --save-top-k 3", "There is no --save-top-k; here it is --keep-best."),
        ("prune r --interval 3", "There is no --interval; here it is --keep-every."),
        ("prune r --keep_last 3", "There is no --keep_last; here it is --keep-last."),
        ("watch r --interval 3", "There is no --interval; here it is --every."),
        ("list --checkpoint-dir r", "There is no --checkpoint-dir: give RUN without it."),
        ("copy --output_dir r", "There is no --output_dir: give REF and DST without it."),
        ("prune r --kepe-last 3", "--keep-last"),
        ("prune r --zzz", "No such option '--zzz'."),
        ("ls r", "There is no command 'ls'; here it is 'list'."),
        ("verfy r", "No such command 'verfy'. Did you mean 'verify'?"),
    ],
)
def test_the_answer_names_what_to_use(command: str, answer: str) -> None:
    result = invoke(*command.split())
    assert result.exit_code == 2
    assert answer in result.stderr
    assert result.stdout == ""


def test_with_json_wrong_usage_is_an_object_too() -> None:
    for command in ("prune r --max-to-keep 3 --json", "prune r --json"):
        result = invoke(*command.split())
        assert result.exit_code == 2
        assert json.loads(result.stdout)["error"]["exit_code"] == 2


def test_answers_are_commands_and_options_that_exist() -> None:
    context = click.Context(cli)
    commands = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    assert set(other_names._COMMANDS) <= set(commands)
    assert not {word for words in other_names._COMMANDS.values() for word in words} & set(commands)
    options = {name for one in commands.values() if one for option in one.params for name in option.opts}
    assert set(other_names._OPTIONS) <= options
