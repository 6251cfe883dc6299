"""Masked-LM samples, on Megatron-Core's indexed and masked datasets.

A sample is one sequence of the indexed dataset with [CLS] and [SEP] around it: 15% of its tokens,
and at least one, are chosen; of these 80% become [MASK], 10% another token, and 10% stay. The
choice is drawn from the seed and the sample's number, so that it is the same on every rank and
after a resume, and another one in every epoch."""

import functools
from collections import OrderedDict
from typing import Any

import numpy as np
import vocabulary
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.masked_dataset import (
    MaskedWordPieceDataset,
    MaskedWordPieceDatasetConfig,
)
from megatron.core.datasets.utils import Split

NO_LABEL = -1


class DatasetTokenizer:
    """What Megatron's masked datasets ask of a tokenizer: ids, and pieces by their id."""

    def __init__(self, vocab_size: int, digest: str, pieces: dict[int, str]) -> None:
        self.pad, self.cls = vocabulary.PAD, vocabulary.FIRST
        self.sep, self.mask = vocabulary.LAST, vocabulary.MASK
        self.vocab_size = vocab_size
        self.inv_vocab = pieces
        self.unique_identifiers = OrderedDict(digest=digest, vocab_size=vocab_size)


def dataset_config(tokenizer: DatasetTokenizer, **settings: Any) -> MaskedWordPieceDatasetConfig:
    """Return the configuration of `EncoderDataset`.

    Args:
        settings: random_seed, sequence_length, masking_probability, blend or blend_per_split, and
            whatever else Megatron's class takes.
    """
    return MaskedWordPieceDatasetConfig(
        tokenizer=tokenizer,
        short_sequence_probability=0.0,
        masking_max_ngram=1,
        masking_do_full_word=False,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=False,
        **settings,
    )


class EncoderDataset(MaskedWordPieceDataset):
    """Masked-LM samples of an indexed dataset: see the module's words.

    Raises:
        ValueError: a sequence of the dataset is longer than the model's.
    """

    def __init__(
        self,
        indexed_dataset: Any,
        dataset_path: str | None,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: MaskedWordPieceDatasetConfig,
    ) -> None:
        super().__init__(
            indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config
        )
        first = indexed_dataset.document_indices[indexed_indices]
        end = indexed_dataset.document_indices[indexed_indices + 1]
        spans = [np.arange(a, b) for a, b in zip(first, end, strict=True)]
        self._sequences = np.concatenate(spans).astype(np.int32)
        self._check_lengths()
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    def _check_lengths(self) -> None:
        longest = int(self.dataset.sequence_lengths[self._sequences].max()) + 2
        if longest > self.config.sequence_length:
            raise ValueError(
                f"--seq-length {self.config.sequence_length}: {self.dataset_path} holds sequences "
                f"of {longest} tokens, and nothing is cut off; give --seq-length and "
                f"--max-position-embeddings {longest}, or prepare the text with a smaller "
                "--max-length"
            )

    def _shuffled(self, epoch: int) -> np.ndarray:
        seed = [self.config.random_seed, epoch, self.index_split.value]
        return np.random.default_rng(seed).permutation(self._sequences)

    def __len__(self) -> int:
        return len(self._sequences) if self.num_samples is None else self.num_samples

    def __getitem__(self, idx: int) -> dict[str, np.ndarray]:
        """Return "tokens" and "labels", both (seq_length,) int64.

        tokens is 0 ([PAD]) behind the sequence; labels is NO_LABEL where nothing is to be told.
        """
        epoch, place = divmod(int(idx), len(self._sequences))
        ids = [int(i) for i in self.dataset[self._order(epoch)[place]]]
        # Twice the length: the number of chosen tokens is the share of the sequence, and not of a
        # target length.
        target = 2 * len(ids) + round(1 / self.config.masking_probability)
        generator = np.random.RandomState((self.config.random_seed + int(idx)) % 2**32)
        masked, positions, chosen, _, _ = self._create_masked_lm_predictions(ids, target, generator)
        tokens = np.zeros(self.config.sequence_length, dtype=np.int64)
        tokens[: len(ids) + 2] = [vocabulary.FIRST, *masked, vocabulary.LAST]
        labels = np.full(self.config.sequence_length, NO_LABEL, dtype=np.int64)
        labels[np.array(positions) + 1] = chosen
        return {"tokens": tokens, "labels": labels}

    def _get_token_mask(self, numpy_random_state: np.random.RandomState) -> int | None:
        """Return what a chosen token becomes; None leaves it. Never a special token but [MASK]."""
        draw = numpy_random_state.random()
        if draw < 0.8:
            return vocabulary.MASK
        if draw < 0.9:
            first = len(vocabulary.SPECIAL_TOKENS)
            return int(numpy_random_state.randint(first, self.config.tokenizer.vocab_size))
        return None


class MadeUpSequences:
    """Sequences for a rehearsal without data; it has the attributes of an IndexedDataset."""

    def __init__(self, vocab_size: int, longest: int, num_sequences: int = 1000) -> None:
        generator = np.random.default_rng(0)
        lengths = generator.integers(min(4, longest), longest + 1, num_sequences)
        self.sequence_lengths = lengths.astype(np.int32)
        self.document_indices = np.arange(num_sequences + 1)
        self._vocab_size = vocab_size

    def __getitem__(self, idx: int) -> np.ndarray:
        generator = np.random.default_rng(int(idx))
        first = len(vocabulary.SPECIAL_TOKENS)
        return generator.integers(first, self._vocab_size, self.sequence_lengths[idx])


class MadeUpDataset(EncoderDataset):
    """Masked-LM samples of `MadeUpSequences`, for --mock-data."""

    @staticmethod
    def build_low_level_dataset(
        dataset_path: str, config: MaskedWordPieceDatasetConfig
    ) -> IndexedDataset:
        """Make the sequences up."""
        return MadeUpSequences(config.tokenizer.vocab_size, config.sequence_length - 2)
