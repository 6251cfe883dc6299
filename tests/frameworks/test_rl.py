"""AdamS from the code by which other frameworks build Megatron's optimizer: docs/frameworks.md."""

from collections.abc import Callable

import pytest
import torch

from tests.frameworks.conftest import installed
from tests.harness.cluster import Cluster
from tests.harness.thinning import thinned

CASES = "tests.frameworks.rl_cases"

# Framework -> the version of Megatron that is nearest to the one it pins, of those supported.
MEGATRON = {
    "verl": "0.18",
    "skyrl": "0.18",
    "megatron-bridge": "",
    "megatron-bridge_by_name": "",
    "areal": "0.17",
    "ms-swift": "",
    "slime": "0.17",
}


@pytest.mark.parametrize("framework", MEGATRON)
def test_its_own_code_builds_adams_with_the_users_hyperparameters(
    ranks_with_megatron: Callable[[str], Cluster], framework: str
) -> None:
    root = installed(framework.removesuffix("_by_name"))
    ranks = ranks_with_megatron(MEGATRON[framework])
    results = ranks.run(f"{CASES}:build", 2, framework=framework, root=str(root)).results
    for found in results:
        assert found["class"] == "megatron_adams.optimizer.adams.AdamS"
        is_aware = framework != "ms-swift"
        assert found["precision"] is is_aware
        assert found["state"] == (
            {"exp_avg": torch.bfloat16, "master_param": torch.int16}
            if is_aware
            else {"exp_avg": torch.float32}
        )
        assert found["clip_grad"] == 0.5
        assert all(found["moved"])
        for group in found["groups"]:
            assert (group["lr"], group["eps"], tuple(group["betas"])) == (3e-3, 1e-7, (0.88, 0.97))
            assert group["step"] == 3
            # A scheduler multiplies by wd_mult: biases and norms do not decay.
            assert group["weight_decay"] in (0.07, 0.07 * group["wd_mult"])
    assert {group["wd_mult"] for found in results for group in found["groups"]} == {0.0, 1.0}


PRECISIONS: dict[str, dict[str, object]] = {
    "plain": {"bf16": True},
    "precision_aware": {
        "bf16": True,
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": "bfloat16",
    },
    "fp32": {},
}


@pytest.mark.parametrize("mover", ["megatron", "verl", "nemo-rl"])
@pytest.mark.parametrize("precision", thinned(PRECISIONS, full=["fp32"]))
def test_state_that_goes_and_comes_back_changes_no_bit(
    ranks_with_megatron: Callable[[str], Cluster], mover: str, precision: str
) -> None:
    root = None if mover == "megatron" else str(installed(mover))
    ranks = ranks_with_megatron("")
    case, fields = f"{CASES}:offload_between_steps", PRECISIONS[precision]
    stayed = ranks.run(case, 2, mover="none", fields=fields).results
    moved = ranks.run(case, 2, mover=mover, root=root, fields=fields).results
    for still, other in zip(stayed, moved, strict=True):
        assert other["kept"] == 0
        assert other["num_tensors"] > 0
        for name in ("params", "state"):
            pairs = zip(still[name], other[name], strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs), name
