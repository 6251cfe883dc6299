"""Tell utterances of one's own domain from others: the first stage of arXiv:2103.15871.

A logistic regression on hashed 1-2-grams of the spoken words, trained on the labelled utterances
and on text of other domains. Of the pool, utterances with a confidence of at least 0.5 stay."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

from ngrams import spoken_words

CONFIDENCE = 0.5
_FOLDS = 5
_HASHED = 1 << 18


@dataclass(frozen=True)
class HeldOut:
    """What a filter does with labelled utterances and other text that it was not trained on.

    The precision is that in this mix; in a pool with more other text it is lower. The share of
    other text that passes does not depend on the mix.

    Attributes:
        recall: the share of the domain's utterances that stay.
        precision: the share of what stays that is of the domain.
        false_positive_rate: the share of the other text that stays.
    """

    positives: int
    negatives: int
    recall: float
    precision: float
    false_positive_rate: float

    def __str__(self) -> str:
        return (
            f"recall {self.recall:.3f}, precision {self.precision:.3f}, "
            f"{self.false_positive_rate:.3f} of other text stays "
            f"({self.positives:,} utterances of the domain, {self.negatives:,} others, "
            f"{_FOLDS}-fold cross-validation)"
        )


def check_confidences(confidences: NDArray[np.floating[Any]], source: str) -> None:
    """Refuse confidences that are no numbers from 0 to 1.

    Raises:
        ValueError: one is NaN or out of range; the first one is named.
    """
    wrong = np.flatnonzero(~((confidences >= 0) & (confidences <= 1)))
    if len(wrong):
        what = f"{len(wrong):,} of {len(confidences):,} confidences, first that of utterance"
        raise ValueError(
            f"{source}: {what} {wrong[0]}, are {confidences[wrong[0]]}: must be from 0 to 1; "
            "train the model again, with a lower rate if it diverged"
        )


class DomainFilter:
    """A trained filter.

    Args:
        positives: texts of the domain.
        negatives: texts of other domains.
    Raises:
        ValueError: there are fewer than five of either.
    """

    def __init__(
        self,
        positives: Sequence[str],
        negatives: Sequence[str],
        *,
        confidence: float = CONFIDENCE,
        seed: int = 0,
    ) -> None:
        from sklearn.model_selection import StratifiedKFold, cross_val_predict

        for name, texts in (("--labelled", positives), ("--other-domains", negatives)):
            if len(texts) < _FOLDS:
                what = f"{len(texts)} utterances: must be at least {_FOLDS}"
                raise ValueError(f"{name}: {what} to train the domain filter; give more")
        if not 0 < confidence < 1:
            raise ValueError(f"--confidence {confidence}: must be above 0 and below 1")
        self.confidence = confidence
        texts = [*positives, *negatives]
        is_domain = np.arange(len(texts)) < len(positives)
        folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
        guessed = cross_val_predict(
            self._model(), texts, is_domain, cv=folds, method="predict_proba"
        )
        self.held_out = self._held_out(guessed[:, 1], is_domain)
        self.model = self._model().fit(texts, is_domain)

    @staticmethod
    def _model() -> Any:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        hashed = HashingVectorizer(analyzer=_one_two_grams, n_features=_HASHED)
        # Balanced: the mix of the training text says nothing about the mix of the pool.
        return make_pipeline(hashed, LogisticRegression(class_weight="balanced", max_iter=1000))

    def _held_out(self, confidences: NDArray[np.float64], is_domain: NDArray[np.bool_]) -> HeldOut:
        stays = confidences >= self.confidence
        right = int((stays & is_domain).sum())
        num_domain = int(is_domain.sum())
        num_others = len(is_domain) - num_domain
        return HeldOut(
            num_domain,
            num_others,
            right / num_domain,
            right / max(int(stays.sum()), 1),
            int((stays & ~is_domain).sum()) / num_others,
        )

    def confidences(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return how likely each text is of the domain, (texts,), from 0 to 1."""
        found: NDArray[np.float64] = self.model.predict_proba(texts)[:, 1]
        return found


def _one_two_grams(text: str) -> list[str]:
    words = spoken_words(text)
    return words + [" ".join(pair) for pair in itertools.pairwise(words)]
