"""Models that nothing was trained with, as the members of examples/nlu_ssl's committee.

The test that imports this has put the examples' folders into sys.path."""

from pathlib import Path

import torch
from bilstm_crf import BiLstmCrf, Sizes
from labels import LabelSet
from vocabulary import UNKNOWN
from vocabulary import train as train_vocabulary


def write_members(folder: Path, *, fails_at_unknown: bool = False) -> Path:
    """Write two models, and return their folder.

    Args:
        fails_at_unknown: the second one answers NaN where a word has an unknown character.
    """
    tokenizer = train_vocabulary(["play the song of ann", "stop it now"], 60)
    labels = LabelSet(("Play", "Stop"), ("O", "B-name", "I-name"))
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = BiLstmCrf(Sizes(8, 8, 24), labels, tokenizer)
        if fails_at_unknown and seed:
            with torch.no_grad():
                model.embedding.weight[UNKNOWN] = torch.nan
        model.save(folder / f"member-{seed}")
    return folder
