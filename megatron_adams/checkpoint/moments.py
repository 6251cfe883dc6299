"""The size of AdamW's and of AdamS's next updates, from a checkpoint of AdamW's.

Called by the command `megatron-adams tune`. Imports torch and the modules of this folder.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_adams.checkpoint.files import (
    DamagedCheckpointError,
    checkpoint_in,
    common_state,
    damage,
    is_fsdp_dtensor,
    is_legacy,
    load,
    read,
    unpickle,
)

_EXP_AVG, _EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
# `_adams_squares`: points of |m| / sqrt(s), of which AdamW's can be a few, and of the normal
# distribution.
_TABLE_SIZE, _TABLE_END, _NUM_QUANTILES = 4096, 8.0, 64


class AdamMoments(NamedTuple):
    """What a checkpoint of AdamW's says of both optimizers' updates, before lr and weight decay.

    Attributes:
        folder: of the checkpoint.
        iteration: of the run that saved it.
        lr: the peak learning rate of that run.
        num_elements: how many elements have an exp_avg_sq.
        adamw_rms: the root mean square of exp_avg / (sqrt(exp_avg_sq) + eps), with both bias
            corrections: AdamW's last update.
        adams_rms: an estimate of AdamS's, see `_adams_squares`.
    """

    folder: Path
    iteration: int
    lr: float
    num_elements: int
    adamw_rms: float
    adams_rms: float


class _Adam(NamedTuple):
    """The hyperparameters of the run, and the factors of its bias corrections."""

    beta1: float
    eps: float
    exp_avg_factor: float
    exp_avg_sq_factor: float


def read_moments(
    source: Path, *, adams_beta2: float, report: Callable[[str], None] = lambda line: None
) -> AdamMoments:
    """Take the RMS of both optimizers' updates from a checkpoint of Megatron's (0.19).

    Args:
        source: a folder with the tracker file, or an iter_ folder; in the formats torch_dist and
            torch.
        adams_beta2: beta2 of the AdamS that is looked at.
        report: is told each file.
    Raises:
        ValueError: there is no checkpoint of Adam's at `source`, or none with its state, or its
            state is not finite.
        DamagedCheckpointError: it is not whole.
        OSError: it cannot be read.
        ImportError: it contains objects of Megatron, and Megatron is not installed.
    """
    folder = checkpoint_in(source)
    if (found := damage(folder)) is not None:
        raise DamagedCheckpointError(f"{folder}: {found}; the checkpoint is incomplete")
    if is_fsdp_dtensor(folder):
        raise ValueError(
            f"{folder}: is of the format fsdp_dtensor; must be of torch_dist or torch; run the job "
            f"for some steps with --adams-log-adamw-rms instead"
        )
    state = common_state(folder, weights_only=False)
    args: Any = state.get("args")
    _check_saved_by_adam(folder, args)
    iteration = int(state["iteration"])
    adam = _Adam(
        beta1=args.adam_beta1,
        eps=args.adam_eps,
        exp_avg_factor=1 / (1 - args.adam_beta1 ** max(iteration, 1)),
        exp_avg_sq_factor=1 / (1 - args.adam_beta2 ** max(iteration, 1)),
    )
    table = _adams_squares(args.adam_beta1, adams_beta2)
    pairs = _pairs_of_legacy(folder, report) if is_legacy(folder) else _pairs(folder, report)
    num_elements, adamw_squares, adams_squares = 0, 0.0, 0.0
    for exp_avg, exp_avg_sq in pairs:
        _check_finite(folder, exp_avg, exp_avg_sq)
        num, adamw, adams = _squares(exp_avg, exp_avg_sq, adam, table)
        num_elements, adamw_squares = num_elements + num, adamw_squares + adamw
        adams_squares += adams
    if not num_elements:
        raise ValueError(
            f"{folder}: has no {_EXP_AVG_SQ} that is not 0; must have Adam's state after a step; "
            f"give a later checkpoint, saved without --no-save-optim"
        )
    return AdamMoments(
        folder=folder,
        iteration=iteration,
        lr=args.lr,
        num_elements=num_elements,
        adamw_rms=math.sqrt(adamw_squares / num_elements),
        adams_rms=math.sqrt(adams_squares / num_elements),
    )


def _check_saved_by_adam(folder: Path, args: Any) -> None:
    optimizer = getattr(args, "optimizer", None)
    if optimizer != "adam":
        raise ValueError(
            f"{folder}: was saved with --optimizer {optimizer}; must be adam's, which has "
            f"{_EXP_AVG_SQ}; give a checkpoint of the AdamW run"
        )
    if getattr(args, "no_save_optim", False):
        raise ValueError(
            f"{folder}: was saved with --no-save-optim; must have Adam's state; give a checkpoint "
            f"that was saved without that flag"
        )


def _check_finite(folder: Path, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    for name, tensor in ((_EXP_AVG, exp_avg), (_EXP_AVG_SQ, exp_avg_sq)):
        bad = ~tensor.isfinite()
        if bad.any():
            raise ValueError(
                f"{folder}: {int(bad.sum())} elements of an {name} are inf or NaN; must be "
                f"finite; give a checkpoint from before the run diverged"
            )


def _squares(
    exp_avg: Tensor, exp_avg_sq: Tensor, adam: _Adam, table: Tensor
) -> tuple[int, float, float]:
    """Return how many elements have had a gradient, and the sums of both updates' squares."""
    # An element without gradients, or of a bucket's padding, does not move.
    has_moved = exp_avg_sq > 0
    m = exp_avg[has_moved].float() * adam.exp_avg_factor
    root = (exp_avg_sq[has_moved].float() * adam.exp_avg_sq_factor).sqrt_()
    adamw = (m / (root + adam.eps)).square_().sum(dtype=torch.float64).item()
    places = (m.abs_() / root).mul_(_TABLE_SIZE / _TABLE_END).clamp_(max=_TABLE_SIZE - 1)
    adams = table[places.to(torch.int64)].sum().item()
    return m.numel(), adamw, adams


def _adams_squares(beta1: float, beta2: float) -> Tensor:
    """Return AdamS's squared update as a function of AdamW's |m| / sqrt(s), an expectation.

    AdamS's update needs the last gradient, and a checkpoint has only its mean square, s. It is
    taken to be one of a white noise without a mean. Given m, g is then normal with the mean
    (1 + beta1) m and the standard deviation beta1 sqrt(s); the exp_avg before is
    (m - (1 - beta1) g) / beta1. In training, gradients are no white noise: there the RMS from this
    estimate was 3 to 27% below the true one, and mostly about 10%.

    Returns:
        (_TABLE_SIZE,) fp64, for the middles of equal steps from 0 to _TABLE_END; eps is left out.
    """
    steps = torch.arange(_TABLE_SIZE, dtype=torch.float64, device="cpu")
    m = ((steps + 0.5) * (_TABLE_END / _TABLE_SIZE))[:, None]
    quantiles = torch.arange(_NUM_QUANTILES, dtype=torch.float64, device="cpu")
    shares = (quantiles + 0.5) / _NUM_QUANTILES
    grad = (1 + beta1) * m + beta1 * torch.special.ndtri(shares)
    old = (m - (1 - beta1) * grad) / beta1 if beta1 else torch.zeros_like(grad)
    squares: Tensor = (m**2 / (beta2 * old**2 + (1 - beta2) * grad**2)).mean(dim=1)
    return squares


def _pairs(folder: Path, report: Callable[[str], None]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each exp_avg and exp_avg_sq of a torch_dist checkpoint, flat and of one size."""
    storage = FileSystemReader(folder).read_metadata().storage_data
    places = {(index.fqn, index.offset): stored for index, stored in storage.items()}
    mine: dict[str, list[tuple[Any, Any]]] = {}
    for (fqn, offset), stored in places.items():
        parts = fqn.split(".")
        if ".param_state/" in fqn:
            mine.setdefault(stored.relative_path, []).append((stored, None))
        elif _EXP_AVG in parts:
            square = ".".join(_EXP_AVG_SQ if part == _EXP_AVG else part for part in parts)
            if (other := places.get((square, offset))) is not None:
                mine.setdefault(stored.relative_path, []).append((stored, other))
    for number, (name, items) in enumerate(sorted(mine.items()), 1):
        for stored, other in items:
            if other is not None:
                yield read(folder, stored).flatten(), read(folder, other).flatten()
                continue
            with open(folder / stored.relative_path, "rb") as file:
                file.seek(stored.offset)
                yield from _pairs_in(unpickle(file.read(stored.length)))
        report(f"[{number}/{len(mine)}] {name}")


def _pairs_of_legacy(
    folder: Path, report: Callable[[str], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    paths = sorted(path for path in folder.rglob("*.pt") if path.is_file())
    for number, path in enumerate(paths, 1):
        yield from _pairs_in(load(path))
        report(f"[{number}/{len(paths)}] {path.relative_to(folder)}")


def _pairs_in(tree: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs of tensors in nested dicts and lists."""
    if isinstance(tree, Mapping):
        exp_avg, exp_avg_sq = tree.get(_EXP_AVG), tree.get(_EXP_AVG_SQ)
        if isinstance(exp_avg, Tensor) and isinstance(exp_avg_sq, Tensor):
            yield exp_avg.flatten(), exp_avg_sq.flatten()
            return
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for entry in tree:
            yield from _pairs_in(entry)
