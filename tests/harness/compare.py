"""Two runs are the same, or one goes on as the other did: rank by rank, bit for bit.

A run is what `tests.distributed.cases.train` returns on every rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tests.harness.argv import SAVED_AT
from tests.harness.cluster import Outcome

Rank = dict[str, Any]
Run = Outcome | Sequence[Rank]

OF_STEPS = frozenset(
    {"losses", "grad_norms", "num_zeros", "skipped", "rates", "loss_scales", "changed"}
)
"""What is a list with a value for each step."""
OF_PARTS = frozenset({"classes", "groups"})
"""What each of Megatron's optimizers has."""
OF_SHARDS = frozenset({"param", "main_param", "exp_avg", "state", "bytes_per_param"})
"""What each shard of a param has: tensors, but for "state", tensors by key, and the number."""


def ranks_of(run: Run) -> Sequence[Rank]:
    return run.results if isinstance(run, Outcome) else run


def shards(rank: Rank) -> list[dict[str, Any]]:
    """Every shard that a rank's optimizers have."""
    return [shard for part in rank["parts"] for shard in part["shards"]]


def assert_same(mine: Run, theirs: Run, *what: str, last: int | None = None) -> None:
    """Assert that every rank of two runs has the same values, bit for bit.

    Args:
        what: what is compared. "model": the model's params; a name in OF_PARTS or OF_SHARDS;
            or any other key of a rank, such as "losses", "grad_norms", "skipped".
        last: how many values of a name in OF_STEPS are compared, from the end; None: all of them.
    """
    my_ranks, their_ranks = ranks_of(mine), ranks_of(theirs)
    assert len(my_ranks) == len(their_ranks) > 0
    if "losses" in what:
        # The last pipeline stage has some.
        assert any(rank["losses"] for rank in their_ranks), "no losses to compare"
    for number, (my_rank, their_rank) in enumerate(zip(my_ranks, their_ranks, strict=True)):
        for name in what:
            where = f"{name} of rank {number}"
            if name == "model":
                assert_same_tensors(my_rank["model"], their_rank["model"], where)
            elif name in OF_PARTS:
                my_values, their_values = (
                    [part[name] for part in rank["parts"]] for rank in (my_rank, their_rank)
                )
                assert my_values == their_values, where
            elif name in OF_SHARDS:
                assert_same_shards(my_rank, their_rank, name, where)
            elif name in OF_STEPS and last is not None:
                assert my_rank[name][-last:] == their_rank[name][-last:], where
            else:
                assert my_rank[name] == their_rank[name], where


def assert_same_shards(my_rank: Rank, their_rank: Rank, name: str, where: str) -> None:
    """One of OF_SHARDS, of every shard of a rank, and there are some."""
    assert shards(their_rank), f"no shards to compare: {where}"
    for mine, theirs in zip(shards(my_rank), shards(their_rank), strict=True):
        if name == "state":
            assert_same_tensors(mine["state"], theirs["state"], where)
        elif name == "bytes_per_param":
            assert mine[name] == theirs[name], where
        else:
            assert torch.equal(mine[name], theirs[name]), where


def assert_same_tensors(
    mine: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], where: str = ""
) -> None:
    """The same names, and the same bits under each."""
    assert mine.keys() == theirs.keys(), where
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), f"{name} ({where})"


def assert_continues(
    resumed: Run,
    whole: Run,
    steps_before: int = SAVED_AT,
    *,
    what: Iterable[str] = ("param", "state"),
    norm_rtol: float = 0.0,
) -> None:
    """Assert that every rank of a resumed run took the rest of the whole run's steps.

    Args:
        steps_before: how many steps the whole run had taken at the checkpoint.
        what: of OF_SHARDS. Scaled state has its scale found again when it is loaded: of it the
            values are compared, "main_param" and "exp_avg".
        norm_rtol: 0: the gradients' norms have the same bits.
    """
    what = tuple(what)
    my_ranks, their_ranks = ranks_of(resumed), ranks_of(whole)
    for mine, theirs in zip(my_ranks, their_ranks, strict=True):
        norms = theirs["grad_norms"][steps_before:]
        assert len(mine["grad_norms"]) == len(norms)
        if norm_rtol:
            np.testing.assert_allclose(mine["grad_norms"], norms, rtol=norm_rtol)
        else:
            assert mine["grad_norms"] == norms
        assert mine["skipped"] == theirs["skipped"][steps_before:]
        # Fewer where steps were skipped, none on pipeline stages before the last.
        assert mine["losses"] == theirs["losses"][len(theirs["losses"]) - len(mine["losses"]) :]
        for part in mine["parts"]:
            assert part["groups"][0]["step"] == theirs["skipped"].count(0)
        for shard in shards(mine):
            if "state" in what:
                assert set(shard["state"]) == {"exp_avg"}
            else:
                assert set(shard["state"]) <= {"exp_avg", "master_param"}
    assert any(rank["losses"] for rank in my_ranks)
    assert_same(my_ranks, their_ranks, "model", "groups", *what)


def assert_close(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """A checkpoint's tensors equal another's to fp32 rounding of sums in another order."""
    optimizer_keys = {key for key in expected if key.startswith("optimizer.state.")}
    assert {key.split(".")[2] for key in optimizer_keys} == {"param", "exp_avg"}
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        if tensor.is_floating_point():
            # Updates are up to 1e-3 (lr) each: 1e-5 is a hundredth of one step.
            np.testing.assert_allclose(
                actual[key].float(), tensor.float(), rtol=1e-4, atol=1e-5, err_msg=key
            )
