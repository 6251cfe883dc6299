"""The rule by which a learning rate is suggested, its source, and how well it did."""

import dataclasses
import math
from typing import Any

RULE = "lr of AdamS = lr of AdamW x (update RMS of AdamW / update RMS of AdamS)"
REASON = (
    "so that both optimizers move the parameters by the same root mean square. Moonlight "
    "(arXiv:2502.16982) gives Muon AdamW's learning rate in this way."
)
BETA2 = 0.95
BETA2_REASON = (
    "the paper's value. Neither RMS says anything about it, and 0.99 was worse with two of three "
    "seeds in this repository's GPU study, so no other value is suggested."
)


# docs/hyperparameters.md has the table.
ACCURACY = (
    "in 13 of 19 small jobs (100 to 900 steps, up to 124 million parameters), the best rate of "
    "AdamS, which is the minimum of a parabola through a sweep, was within a factor 1.5 of the "
    "suggestion. In the other 6, of 100 steps, it was up to 2.24 times the suggestion. Longer "
    "jobs and larger models were not measured. If you can, try twice the suggestion, too."
)


class TuneError(ValueError):
    """There is no suggestion; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """What to give AdamS.

    Attributes:
        lr_adamw: the learning rate that AdamW has.
        rms_adams, rms_adamw: of the updates, before lr and weight decay.
        origin: where these come from, in words.
    """

    lr_adamw: float
    rms_adams: float
    rms_adamw: float
    origin: str

    @property
    def ratio(self) -> float:
        return self.rms_adamw / self.rms_adams

    @property
    def lr(self) -> float:
        """AdamS's learning rate."""
        return self.lr_adamw * self.ratio

    def to_json(self) -> dict[str, Any]:
        """Return everything that `lines` says."""
        return {
            **dataclasses.asdict(self),
            "ratio": self.ratio,
            "lr": self.lr,
            "adam_beta2": BETA2,
            "rule": RULE,
            "reason": REASON,
            "accuracy": ACCURACY,
            "beta2_reason": BETA2_REASON,
        }

    def lines(self) -> list[tuple[str, str]]:
        """Return (name, value) for each line of the table, and then the words below it."""
        return [
            ("AdamW's --lr", f"{self.lr_adamw:g}"),
            ("update RMS of AdamW", f"{self.rms_adamw:.3f}"),
            ("update RMS of AdamS", f"{self.rms_adams:.3f}"),
            ("measured", self.origin),
            ("suggested --lr for AdamS", f"{self.lr:.2g}, AdamW's times {self.ratio:.2f}"),
            ("--min-lr, --decoupled-lr", f"AdamW's times {self.ratio:.2f}, too"),
            ("--adam-beta2", f"{BETA2}, the default"),
        ]


def suggest(*, lr_adamw: float, rms_adams: float, rms_adamw: float, origin: str) -> Suggestion:
    """Apply the rule.

    Args:
        lr_adamw: AdamW's peak learning rate.
        rms_adams, rms_adamw: of the updates, before lr and weight decay.
        origin: where these come from, in words.
    Raises:
        TuneError: a number is not above 0, or not finite.
    """
    for name, value in (
        ("AdamW's learning rate", lr_adamw),
        ("the update RMS of AdamW", rms_adamw),
        ("the update RMS of AdamS", rms_adams),
    ):
        if not (math.isfinite(value) and value > 0):
            raise TuneError(
                f"{name} is {value}: must be a finite number above 0; look at a part of the run "
                "that trains"
            )
    return Suggestion(lr_adamw, rms_adams, rms_adamw, origin)
