"""`dcp-ckpt plan REF --world-size N`: what a load on other ranks would cost."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import Any

import click

from dcp_ckpt.cli.output import checkpoint_command, human_bytes, print_json, print_table
from dcp_ckpt.ops.checkpoint import open_checkpoint
from dcp_ckpt.ops.plan import LoadPlan, RankLoad, plan_load

__all__ = ["plan_command"]


class _MeshType(click.ParamType[dict[str, int]]):
    """`dp=2,tp=4` as a mapping in that order."""

    name = "mesh"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        mesh: dict[str, int] = {}
        for part in str(value).split(","):
            name, _, size = (text.strip() for text in part.partition("="))
            if not name or name in mesh or not size.isdecimal() or int(size) < 1:
                self.fail(f"{value!r} is not a mesh: write DIM=SIZE,DIM=SIZE as in dp=2,tp=4", param, ctx)
            mesh[name] = int(size)
        return mesh


@click.command(name="plan")
@click.argument("ref")
@click.option("--world-size", type=click.IntRange(min=1), required=True, metavar="N", help="Ranks that load.")
@click.option(
    "--mesh",
    type=_MeshType(),
    metavar="DIM=SIZE,...",
    help="Their device mesh, outermost dimension first, with the names of the stored one.",
)
@checkpoint_command
def plan_command(ref: str, world_size: int, mesh: dict[str, int] | None, as_json: bool) -> None:
    """Show what each of N ranks would read, and the memory it needs, to load the checkpoint REF.

    Tensors are placed as they were saved, on the new mesh; without --mesh, all that is sharded is spread over
    all ranks. Reads tables only: no GPU and no other process is needed.

    \b
    dcp-ckpt plan runs/run-001@latest --world-size 6
    dcp-ckpt plan runs/run-001@latest --world-size 8 --mesh dp=2,tp=4
    """
    with open_checkpoint(ref) as checkpoint:
        plan = plan_load(checkpoint, world_size, mesh=mesh)
    if as_json:
        print_json(_describe(plan))
    else:
        _print_plan(plan)


def _describe(plan: LoadPlan) -> dict[str, Any]:
    return {
        **asdict(plan),
        "ranks": [{**asdict(rank), "num_requests": rank.num_requests} for rank in plan.ranks],
        "needed_bytes": plan.needed_bytes,
        "read_bytes": plan.read_bytes,
        "num_requests": plan.num_requests,
        "read_amplification": plan.read_amplification,
    }


def _print_plan(plan: LoadPlan) -> None:
    mesh = " x ".join(f"{name}={size}" for name, size in plan.mesh.items())
    click.echo(
        f"{plan.directory}: step {plan.step}, {human_bytes(plan.tensor_bytes)} of tensors, "
        f"saved on {plan.stored_world_size} ranks, to load on {plan.world_size} ({mesh})"
    )
    rows = [
        _row(ranks[0], ranks[-1]) for _, same in groupby(plan.ranks, key=_figures) for ranks in [list(same)]
    ]
    print_table(("ranks", "needed", "read", "reads", "fragments", "memory"), rows)
    click.echo(
        f"in all: {human_bytes(plan.needed_bytes)} needed, {human_bytes(plan.read_bytes)} read "
        f"({plan.read_amplification:.2f}x), {plan.num_requests} requests"
    )
    if plan.num_partial:
        click.echo(
            f"{plan.num_partial} tensors were saved by some of the ranks only; they are counted as if every "
            "rank took part in them"
        )


def _figures(rank: RankLoad) -> tuple[int, ...]:
    return (rank.needed_bytes, rank.read_bytes, rank.num_reads, rank.num_fragments, rank.memory_bytes)


def _row(first: RankLoad, last: RankLoad) -> tuple[str, ...]:
    return (
        str(first.rank) if first.rank == last.rank else f"{first.rank}-{last.rank}",
        human_bytes(first.needed_bytes),
        human_bytes(first.read_bytes),
        str(first.num_reads),
        f"{first.num_fragments} ({human_bytes(first.fragment_bytes)})",
        human_bytes(first.memory_bytes),
    )
