"""What a checkpoint of AdamW's says of AdamS's update: white noise, and numbers that are none."""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_adams.checkpoint import read_moments

NUM_STEPS = 400


def save(folder: Path, states: list[dict[str, torch.Tensor]], **args: Any) -> Path:
    given = {"optimizer": "adam", "lr": 6e-4, "adam_beta1": 0.9, "adam_beta2": 0.95}
    (folder / "mp_rank_00").mkdir(parents=True)
    content = {
        "args": Namespace(**{**given, "adam_eps": 1e-8, "no_save_optim": False, **args}),
        "iteration": NUM_STEPS,
        "optimizer": {"state": dict(enumerate(states))},
    }
    torch.save(content, folder / "mp_rank_00" / "model_optim_rng.pt")
    return folder


def noise(beta1: float, beta2: float, scale: float) -> tuple[dict[str, torch.Tensor], float, float]:
    """Moments of gradients that are white noise, and the sums of AdamW's and AdamS's squares."""
    generator = np.random.default_rng(0)
    m, s = np.zeros(20_000), np.zeros(20_000)
    for _ in range(NUM_STEPS):
        grad = generator.normal(scale=scale, size=m.shape)
        v = 0.95 * m**2 + 0.05 * grad**2
        m, s = beta1 * m + (1 - beta1) * grad, beta2 * s + (1 - beta2) * grad**2
    corrected = s / (1 - beta2**NUM_STEPS)
    state = {"exp_avg": torch.from_numpy(m).float(), "exp_avg_sq": torch.from_numpy(s).float()}
    return state, (m**2 / corrected).mean(), (m**2 / v).mean()


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.95), (0.9, 0.999), (0.8, 0.95)])
def test_estimate_is_right_where_gradients_are_noise(
    tmp_path: Path, beta1: float, beta2: float
) -> None:
    state, adamw, adams = noise(beta1, beta2, scale=1e-3)
    # What has had no gradients does not count.
    padding = {"exp_avg": torch.zeros(500), "exp_avg_sq": torch.zeros(500)}
    folder = save(tmp_path / "x", [state, padding], adam_beta1=beta1, adam_beta2=beta2)
    moments = read_moments(folder, adams_beta2=0.95)
    assert moments.num_elements == 20_000
    assert moments.adamw_rms == pytest.approx(math.sqrt(adamw), rel=1e-3)
    # E g^2 is known to a few percent only, from the last 20 gradients.
    assert moments.adams_rms == pytest.approx(math.sqrt(adams), rel=0.03)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_state_that_is_not_finite_is_refused(tmp_path: Path, key: str, value: float) -> None:
    state = {"exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}
    state[key][2] = value
    folder = save(tmp_path / "x", [state])
    with pytest.raises(ValueError, match=f"1 elements of an {key} are inf or NaN; must be finite"):
        read_moments(folder, adams_beta2=0.95)


def test_checkpoint_from_before_the_first_step_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "x", [{"exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}])
    with pytest.raises(ValueError, match=r"has no exp_avg_sq that is not 0; must have .* give"):
        read_moments(folder, adams_beta2=0.95)
