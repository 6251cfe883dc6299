"""AdamS under DeepSpeed's ZeRO: the bits of a plain loop, checkpoints, and the two flags."""

from collections.abc import Callable
from pathlib import Path

import torch

from tests.harness.cluster import Cluster

CASES = "tests.frameworks.deepspeed_cases"


def test_every_stage_has_the_bits_of_a_plain_loop_and_resumes(
    cluster_with: Callable[[str], Cluster], tmp_path: Path
) -> None:
    cluster = cluster_with("deepspeed")
    outcome = cluster.run(f"{CASES}:train_and_resume", 2, timeout_s=240, folder=str(tmp_path))
    for found in outcome.results:
        plain = found.pop("plain")
        assert len(found) == 8
        for name, run in found.items():
            assert run["inner"] == "AdamS", name
            for whole, resumed, expected in zip(run["whole"], run["resumed"], plain, strict=True):
                assert torch.equal(whole, resumed), name
                if whole.dtype == torch.float32:
                    assert torch.equal(whole, expected), name
                else:
                    # Gradients of bf16 weights: 8 bits.
                    assert torch.allclose(whole.float(), expected, atol=0.02), name


def test_the_two_flags_are_needed(cluster_with: Callable[[str], Cluster]) -> None:
    cluster = cluster_with("deepspeed")
    (errors,) = cluster.run(f"{CASES}:refused").results
    assert "zero_allow_untested_optimizer" in errors[0]
    assert "zero_force_ds_cpu_optimizer" in errors[1]
