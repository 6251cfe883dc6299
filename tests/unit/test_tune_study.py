"""examples/quality/tune_study.py: which rates it tries, what it measures, its table."""

import math
import sys
from pathlib import Path

import pytest
import torch

from megatron_adams.update import adams_update_, update_rms

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "quality"))

import tune_study

TINY = tune_study.Setting(1, 16, 2, 16, 4, 8, tied=True)


@pytest.mark.parametrize(
    ("losses", "following"),
    [
        ({}, 4e-3),
        ({4e-3: 2.0}, 2e-3),
        ({4e-3: 2.0, 2e-3: 2.5}, 8e-3),
        ({4e-3: 2.0, 2e-3: 1.5}, 1e-3),
        ({4e-3: 2.0, 2e-3: 2.5, 8e-3: 2.1}, None),
    ],
)
def test_rates_are_tried_until_the_best_has_worse_neighbors(
    losses: dict[float, float], following: float | None
) -> None:
    assert tune_study.next_rate(losses, 4e-3) == following


def test_best_rate_is_the_minimum_of_the_parabola() -> None:
    losses = {lr: (math.log2(lr / 3e-3)) ** 2 for lr in (1e-3, 2e-3, 4e-3, 8e-3)}
    assert tune_study.best_rate(losses) == pytest.approx(3e-3)


def test_updates_are_measured_as_the_product_has_them() -> None:
    torch.manual_seed(0)
    param, exp_avg, exp_avg_sq = torch.ones(3, 50), torch.zeros(3, 50), torch.zeros(3, 50)
    moments = tune_study.Moments([param])
    for step in range(1, 6):
        grad = torch.randn(3, 50)
        sums = torch.zeros(2, dtype=torch.int64)
        adams_update_(
            param, grad, exp_avg, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
            step=step, update_sums=sums,
        )  # fmt: skip
        exp_avg_sq.mul_(0.95).add_(0.05 * grad**2)
        adamw = exp_avg / (1 - 0.9**step) / ((exp_avg_sq / (1 - 0.95**step)).sqrt() + 1e-8)
        adams = update_rms(sums, torch.tensor(150)).item()
        squares = moments.add([grad])
        assert math.sqrt(squares[0]) == pytest.approx(adams, rel=1e-4)
        assert squares[1] == pytest.approx(adamw.square().mean().item(), rel=1e-4)


def test_study_goes_on_where_it_was_and_says_what_came_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (torch.arange(4000) % 251).to(torch.uint8)
    monkeypatch.setattr(tune_study, "read_text", lambda: (text, text))
    monkeypatch.setattr(tune_study, "HELD_OUT_BYTES", 256)
    monkeypatch.setattr(tune_study, "SETTINGS", {"tiny": TINY})
    # Of rates that are too far apart to train alike, the middle one is the best.
    best = iter([2.0, 3.0, 4.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(tune_study.Lab, "held_out_loss", lambda *_: next(best))
    command = ["tune_study.py", "--out", str(tmp_path), "--settings", "tiny"]
    monkeypatch.setattr(sys, "argv", command)
    tune_study.main()
    told = (tmp_path / "tune.md").read_text()
    assert told in capsys.readouterr().out
    assert "1 x 16, tied, 64 tokens a step, 8 steps | 0.0036 | 0.0018 |" in told
    rows = (tmp_path / "tune.csv").read_text()
    assert rows.count("\n") == 1 + 3 + 3 + 1
    tune_study.main()
    assert (tmp_path / "tune.csv").read_text() == rows
