"""Pretrain an encoder of a named size with AdamS, or with AdamW: recipe.toml says how.

    train_encoder.py --model NAME --data FOLDER --out FOLDER [-- more flags of Megatron's]
    train_encoder.py --model 9.3b --cpu-rehearsal

FOLDER is a dataset of prepare_text.py; the model is in OUT/checkpoints. Stage 2 goes on from
Stage 1: -- --pretrained-checkpoint STAGE1/checkpoints
--train-data-path 0.8 POOL/train 0.2 PUBLIC/train

The memory plan is that of a GPT with these layers, which has all but the masked-LM head's
hidden^2 + 3 hidden + vocabulary parameters."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import prepare_text
from shared import launch
from shared.command import Flags

FOLDER = Path(__file__).resolve().parent
RECIPE = FOLDER / "recipe.toml"


def dataset_flags(folder: Path) -> Flags:
    """Return the flags that train on a dataset of prepare_text.py.

    Raises:
        ValueError: the folder holds no dataset.
    """
    record, folder = prepare_text.read_record(folder), folder.resolve()
    return {
        "encoder-tokenizer": folder,
        "tokenizer-type": "NullTokenizer",  # the dataset holds ids
        "vocab-size": record["vocab_size"],
        "train-data-path": folder / "train",
        "valid-data-path": folder / "held_out",
    }


OWN_FLAGS = frozenset({"encoder-tokenizer"})
SCRIPT = launch.Script(FOLDER / "pretrain_encoder.py", dataset_flags, OWN_FLAGS)

if __name__ == "__main__":
    sys.exit(launch.main(RECIPE, script=SCRIPT))
