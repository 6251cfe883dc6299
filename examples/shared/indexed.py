"""Megatron's indexed datasets, which training reads."""

import warnings
from pathlib import Path
from typing import Any


def indexed_dataset_builder(prefix: Path, vocab_size: int) -> Any:
    """Return Megatron's IndexedDatasetBuilder for prefix.bin; `finalize` writes prefix.idx.

    Args:
        vocab_size: ids are smaller; it decides on the dtype.
    """
    # Imported here: it takes seconds, and warns of missing packages that matter in training alone.
    warnings.filterwarnings("ignore", "Could not determine rank")  # there is one process
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    return IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
