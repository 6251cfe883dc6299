"""Runs of module_cases.py, a small MegatronModule of our own, and what holds for each of them."""

from typing import Any

import numpy as np
import torch

from tests.harness.cluster import Cluster

TRAIN = "tests.distributed.module_cases:train"
Rank = dict[str, Any]


def run(cluster: Cluster, num_ranks: int, **kwargs: Any) -> list[Rank]:
    ranks: list[Rank] = cluster.run(TRAIN, num_ranks, timeout_s=60, **kwargs).results
    for rank in ranks:
        # One state element for each element of the main params, on every rank of every layout.
        assert rank["state"] == rank["main"]
        assert rank["state_keys"] in (["exp_avg"], [])
    return ranks


def assert_matches(ranks: list[Rank], single: Rank, sharded_over_tp: bool = False) -> None:
    """Params and grad norms equal the single process's to fp32 rounding."""
    for rank in ranks:
        # Summed in another order, by 20 steps of up to 1e-2 (lr) each: 1e-5 is 1/1000 of a step.
        np.testing.assert_allclose(rank["grad_norms"], single["grad_norms"], rtol=1e-4)
    names = [name for name in single["params"] if not name.startswith("experts")]
    for name in names:
        copies = [rank["params"][name] for rank in ranks]
        if sharded_over_tp and name != "norm":
            copies = [torch.cat(copies)]
        for copy in copies:
            torch.testing.assert_close(copy, single["params"][name], rtol=1e-4, atol=1e-5)


def assert_loaded(ranks: list[Rank]) -> None:
    """What is loaded is what was saved ten steps before the end."""
    for rank in ranks:
        saved, loaded = rank["saved"], rank["loaded"]
        assert set(saved["steps"]) == {10}
        assert loaded["steps"] == saved["steps"]
        for key in ("params", "exp_avg"):
            assert len(loaded[key]) == len(saved[key])
            for mine, theirs in zip(loaded[key], saved[key], strict=True):
                assert torch.equal(mine, theirs)
    end = torch.cat([param.flatten() for param in ranks[0]["params"].values()])
    at_save = torch.cat([param.flatten() for param in ranks[0]["saved"]["params"]])
    assert not torch.equal(end[: len(at_save)], at_save)
