"""A recipe: Megatron's flags for the models of a family, from a TOML file.

Nothing here imports Megatron."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from shared.command import WITHOUT_TRANSFORMER_ENGINE, Flags

OPTIMIZERS = ("adams", "adamw")
PRECISIONS = ("bf16", "fp8")

_SECTIONS = {"megatron", "precision", "optimizers", "models"}


@dataclass(frozen=True)
class Recipe:
    """The contents of a recipe.toml.

    Attributes:
        megatron: what every model is trained with.
        transformer_engine: added where TransformerEngine is installed.
        precision: added for each of PRECISIONS.
        optimizers: added for each of OPTIMIZERS.
        models: by name, each with a table for each optimizer inside: its learning rates.
    """

    path: Path
    megatron: Flags
    transformer_engine: Flags
    precision: dict[str, Flags]
    optimizers: dict[str, Flags]
    models: dict[str, Flags]

    @classmethod
    def load(cls, path: Path) -> "Recipe":
        """Read a recipe.

        Raises:
            ValueError: the file is missing, is no TOML, lacks a section, or has one that is not
                known.
        """
        try:
            tables = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError) as exc:
            raise ValueError(f"recipe {path}: cannot be read ({exc})") from exc
        if missing := sorted(_SECTIONS - tables.keys()):
            raise ValueError(f"recipe {path}: has no [{'], ['.join(missing)}]; add it")
        if unknown := sorted(tables.keys() - _SECTIONS - {"transformer_engine"}):
            raise ValueError(
                f"recipe {path}: [{'], ['.join(unknown)}] is not known; a recipe has "
                f"{', '.join(sorted(_SECTIONS))} and transformer_engine"
            )
        return cls(path=path, **{"transformer_engine": {}, **tables})

    def flags(
        self, model: str, optimizer: str, precision: str, *, transformer_engine: bool
    ) -> Flags:
        """Merge what a model is trained with.

        Args:
            transformer_engine: whether the ranks have it. Without it, its section is left out, and
                Megatron's own layers are asked for.
        """
        flags = self.megatron | self.models[model] | self.precision[precision]
        flags |= self.optimizers[optimizer] | cast(Flags, flags[optimizer])
        if transformer_engine:
            flags |= self.transformer_engine
        else:
            flags |= WITHOUT_TRANSFORMER_ENGINE
        return {name: value for name, value in flags.items() if name not in OPTIMIZERS}


def parse_flags(words: Sequence[str]) -> Flags:
    """Read a command line's flags: the inverse of `command_line_flags`.

    `--flag value`, `--flag=value`, `--flag a b` (a list) and `--flag` (True); the last of two wins.

    Raises:
        ValueError: a word belongs to no flag.
    """
    flags: Flags = {}
    values: list[str] | None = None
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = [value] if equals else []
        elif values is None:
            raise ValueError(f"{word}: not a flag; flags of Megatron start with --, as --lr 1e-4")
        else:
            values.append(word)
        flags[name] = True if not values else values[0] if len(values) == 1 else values
    return flags


def number(flags: Flags, name: str, default: int | None = None) -> int:
    """Return a flag's whole number.

    Raises:
        ValueError: it is missing and has no default, or is not a positive whole number.
    """
    value = flags.get(name, default)
    try:
        parsed = int(str(value))
    except ValueError:
        parsed = 0
    if parsed < 1:
        raise ValueError(f"--{name} {value}: must be a positive whole number")
    return parsed


def model_parallel_size(flags: Flags) -> int:
    """Return how many ranks hold a model once."""
    return (
        number(flags, "tensor-model-parallel-size", 1)
        * number(flags, "pipeline-model-parallel-size", 1)
        * number(flags, "context-parallel-size", 1)
    )


def check_layout(flags: Flags, num_ranks: int) -> None:
    """Say in one sentence, before any rank starts, what Megatron would fail on.

    Raises:
        ValueError: the ranks are no multiple of a model's, or the batch does not divide.
    """
    size = model_parallel_size(flags)
    if num_ranks % size:
        sizes = " x ".join(
            f"{name} {number(flags, flag, 1)}"
            for name, flag in (
                ("tensor", "tensor-model-parallel-size"),
                ("pipeline", "pipeline-model-parallel-size"),
                ("context", "context-parallel-size"),
            )
        )
        raise ValueError(
            f"{num_ranks} ranks: must be a multiple of {size} ({sizes}), which hold the model "
            "once; take more GPUs, or another layout after --"
        )
    data_parallel = num_ranks // size
    batch = number(flags, "global-batch-size")
    micro_batch = number(flags, "micro-batch-size")
    if batch % data_parallel:
        raise ValueError(
            f"{num_ranks} ranks: the {data_parallel} data-parallel ones cannot share a global "
            f"batch of {batch} evenly; take another number of ranks, or give -- --global-batch-size"
        )
    part = batch // data_parallel
    if part % micro_batch:
        fitting = max(size for size in range(1, micro_batch + 1) if part % size == 0)
        raise ValueError(
            f"--micro-batch-size {micro_batch}: each of {data_parallel} data-parallel ranks has "
            f"{part} sequences of a batch of {batch}, which is no multiple of it; give "
            f"-- --micro-batch-size {fitting}"
        )
