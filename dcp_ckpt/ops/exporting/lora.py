"""Low-rank adapters: which belong to which weight, and what the merged model's tensors are called. Pure.

Two spellings are known. Plain: `<module>.lora_a` (rank, in), `<module>.lora_b` (out, rank) and
`<module>.lora_scale` (0-dim) beside `<module>.weight` (out, in). That of the `peft` library:
`<module>.lora_A.<adapter>.weight` and `<module>.lora_B.<adapter>.weight` beside `<module>.base_layer.weight`,
all below `base_model.model`. Called by `plan`; `payloads` does the arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dcp_ckpt.errors import StateMismatch

__all__ = ["Adapter", "Merging", "has_adapters", "plan_merging"]

_PLAIN = re.compile(r"(?P<module>.+)\.lora_(?P<part>a|b|scale)")
_PEFT = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B)\.(?P<adapter>[^.]+)\.weight")
_ANY = re.compile(r"(.+\.)?lora_.+")
_TRAINED_WHOLE = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")
_FLOATING = frozenset({"float64", "float32", "float16", "bfloat16"})

_Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> dtype and shape."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is added to one weight: `scale * up @ down`.

    Args:
        down: name of the stored tensor (rank, in).
        up: name of the stored tensor (out, rank).
        scale: a number, or the name of the stored 0-dim tensor that holds it.
    """

    down: str
    up: str
    scale: str | float

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of what has to be read."""
        return (self.down, self.up) + ((self.scale,) if isinstance(self.scale, str) else ())


@dataclass(frozen=True, kw_only=True)
class Merging:
    """How the model with adapters becomes a plain one.

    Args:
        adapters: by the name of the weight they are added to.
        names: stored name -> name in the merged model, where that differs.
        consumed: what the merged model has no longer, with the reason.
    """

    adapters: Mapping[str, Adapter]
    names: Mapping[str, str]
    consumed: Mapping[str, str]


@dataclass(kw_only=True)
class _Parts:
    """The tensors of one adapter, as far as they were found."""

    base: str
    style: Literal["plain", "peft"]
    names: dict[str, str] = field(default_factory=dict)


def has_adapters(names: Iterable[str]) -> bool:
    """Whether any of these is the name of an adapter's tensor."""
    return any(_ANY.fullmatch(name) for name in names)


def plan_merging(tensors: _Shapes, alpha: float | None) -> Merging:
    """Pair all adapters with their weights.

    Args:
        tensors: those that are exported, by stored name.
        alpha: the scale of adapters without a stored one is `alpha / rank`.

    Raises:
        StateMismatch: there are no adapters, or some cannot be fused; the message names all of these.
    """
    found, problems = _collect(tensors)
    if not found and not problems:
        raise StateMismatch("there are no LoRA adapters to fuse: export without fuse_lora")
    adapters: dict[str, Adapter] = {}
    for module, parts in found.items():
        adapter = _adapter(module, parts, tensors, alpha, problems)
        if adapter is not None:
            adapters[parts.base] = adapter
    is_peft = any(parts.style == "peft" for parts in found.values())
    if problems:
        raise StateMismatch(f"the adapters cannot be fused: {'; '.join(problems)}")
    names, replaced = _peft_names(tensors) if is_peft else ({}, {})
    fused = (name for adapter in adapters.values() for name in adapter.tensors)
    consumed = dict.fromkeys(fused, "fused into their weights")
    return Merging(adapters=adapters, names=names, consumed=consumed | replaced)


def _collect(tensors: _Shapes) -> tuple[dict[str, _Parts], list[str]]:
    """The adapters by module, and what has an adapter's name and is of no kind that is known."""
    found: dict[str, _Parts] = {}
    problems: list[str] = []
    peft_adapters: dict[str, set[str]] = {}
    for name in tensors:
        if match := _PLAIN.fullmatch(name):
            parts = found.setdefault(match["module"], _Parts(base=f"{match['module']}.weight", style="plain"))
        elif match := _PEFT.fullmatch(name):
            parts = found.setdefault(
                match["module"], _Parts(base=f"{match['module']}.base_layer.weight", style="peft")
            )
            peft_adapters.setdefault(match["adapter"], set()).add(name)
        else:
            if _ANY.fullmatch(name):
                problems.append(f"{name} is of a kind that is not known here: merge it with its own library")
            continue
        parts.names[match["part"].lower()] = name
    if len(peft_adapters) > 1:
        problems.append(
            f"there are several adapters, {', '.join(sorted(peft_adapters))}: exclude all but one, as in "
            f"exclude '*.lora_?.{max(peft_adapters)}.*'"
        )
    return found, problems


def _adapter(
    module: str, parts: _Parts, tensors: _Shapes, alpha: float | None, problems: list[str]
) -> Adapter | None:
    """One adapter, or None after adding what is wrong with it to `problems`."""
    missing = [f"lora_{part}" for part in ("a", "b") if part not in parts.names]
    if missing:
        problems.append(f"{module} has no {' and no '.join(missing)}")
        return None
    down, up = parts.names["a"], parts.names["b"]
    if parts.base not in tensors:
        problems.append(f"{down} has no base: there is no {parts.base} among what is exported")
        return None
    if wrong := _misfit(parts.base, down, up, tensors):
        problems.append(wrong)
        return None
    rank = tensors[down][1][0]
    scale = parts.names.get("scale")
    if scale is not None and alpha is not None:
        problems.append(f"{scale} holds the scale of {module}: leave lora_alpha out")
    elif scale is not None:
        if tensors[scale][1] != () or tensors[scale][0] not in _FLOATING:
            problems.append(f"{scale} is {_shown(tensors[scale])}, not a 0-dim floating tensor")
        return Adapter(down=down, up=up, scale=scale)
    elif alpha is not None:
        return Adapter(down=down, up=up, scale=alpha / rank)
    else:
        problems.append(f"{module} has no scale: give lora_alpha, from which it is lora_alpha / {rank}")
    return None


def _misfit(base: str, down: str, up: str, tensors: _Shapes) -> str | None:
    for name in (base, down, up):
        dtype, shape = tensors[name]
        if dtype not in _FLOATING or len(shape) != 2:
            return f"{name} is {_shown(tensors[name])}: only floating matrices can be fused"
    (rows, columns), (rank, width), (height, other_rank) = (tensors[name][1] for name in (base, down, up))
    if rank < 1 or (width, height, other_rank) != (columns, rows, rank):
        return (
            f"{up} {list(tensors[up][1])} times {down} {list(tensors[down][1])} does not give the shape "
            f"{list(tensors[base][1])} of {base}"
        )
    return None


def _shown(tensor: tuple[str, Sequence[int]]) -> str:
    return f"{tensor[0]} of shape {list(tensor[1])}"


def _peft_names(tensors: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What `peft` wraps gets its plain name; what it trained whole takes the place of the original."""
    names: dict[str, str] = {}
    replaced: dict[str, str] = {}
    for name in tensors:
        plain = name.replace(".base_layer.", ".")
        if match := _TRAINED_WHOLE.fullmatch(plain):
            plain = f"{match['module']}.{match['rest']}"
            original = f"{match['module']}.original_module.{match['rest']}"
            if original in tensors:
                replaced[original] = "replaced by what was trained whole"
        plain = re.sub(r"(^|\.)base_model\.model\.", r"\1", plain, count=1)
        if plain != name:
            names[name] = plain
    return names, replaced
