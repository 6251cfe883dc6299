"""A prepared dataset: a folder with what is trained on, what is held out, and its tokenizer."""

import json
from pathlib import Path

from shared.command import Flags

RECORD = "dataset.json"


def dataset_flags(folder: Path) -> Flags:
    """Return Megatron's flags that train on a prepared dataset.

    Raises:
        ValueError: the folder holds no dataset, or an incomplete one.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError) as exc:
        raise ValueError(
            f"--data {folder}: holds no {RECORD} that can be read ({exc}); give a folder that "
            "prepare_data.py has made"
        ) from exc
    folder = folder.resolve()
    flags: Flags = {
        "train-data-path": folder / "train",
        "valid-data-path": folder / "held_out",
        **record["tokenizer"]["flags"],
    }
    if "tokenizer-model" in flags:
        flags["tokenizer-model"] = folder / str(flags["tokenizer-model"])
    return flags
