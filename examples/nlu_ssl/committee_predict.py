"""Ask a committee of trained models about a pool and about held-out utterances.

    committee_predict.py --models runs/ssl/members/models --pool runs/ssl/pool/pool.arrow \\
        --held-out runs/ssl/labelled/validation.jsonl --out runs/ssl/committee

Inputs: a folder with the models' folders, as train_ssl.py writes them; a pool; labelled utterances
that no member was trained on. Outputs, in --out: pool.npz and held_out.npz, for select_pool.py
--method committee; committee.py says what is in them. Of an utterance that a model cannot read, as
it is too long, the model says that all labels are as likely, so that it is not admitted.

--ray-actors N has N processes of Ray answer the pool (ray_predict.py), with the same results."""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

import joint
import numpy as np
import ray_predict
import torch
from committee import Batch, Labels, predictions, write_predictions
from joint import tagged_text
from labelled import Malformed, read_jsonl
from labels import Tagged, load_tagged
from models import NluModel
from numpy.typing import NDArray
from pool_files import read_batches
from tqdm import tqdm
from train_ssl import load_model

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared.command import exit_code_of

_BATCH = 512  # utterances whose tags of all members are held at a time


class Member:
    """A model as committee.py's Predict (`intents`) and PredictSlots (`tags`)."""

    def __init__(self, model: NluModel) -> None:
        self.model = model
        self.last: tuple[Sequence[str], NDArray[np.float32], list[NDArray[np.float32]]] | None
        self.last = None

    def _answers(
        self, texts: Sequence[str]
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        """Return both answers; one pass gives them, and they are asked for one after the other."""
        if self.last is None or self.last[0] is not texts:
            self.last = (texts, *self._passed([tagged_text(text, "") for text in texts]))
        return self.last[1:]

    @torch.no_grad()
    def _passed(
        self, utterances: Sequence[Tagged]
    ) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        labels = self.model.labels
        shape = len(utterances), len(labels.intents)
        intents = np.full(shape, 1 / len(labels.intents), np.float32)
        tags = [
            np.full((len(each.words), len(labels.tags)), 1 / len(labels.tags), np.float32)
            for each in utterances
        ]
        places, encoded = [], []
        for place, each in enumerate(utterances):
            try:
                encoded.append(self.model.encode(each.words, each.place))
            except Malformed:  # too long
                continue
            places.append(place)
        for chosen, prediction in self.model.predictions(encoded):
            of_intents = prediction.intent_log_probs().exp().numpy()
            # Normalized again: the logarithms of marginals are rounded.
            of_tags = prediction.tag_log_probs().softmax(-1).numpy()
            for row, index in enumerate(chosen):
                place = places[index]
                intents[place] = of_intents[row]
                tags[place][:] = of_tags[row, : len(tags[place])]
        return intents, tags

    def intents(self, texts: Sequence[str], /) -> NDArray[np.float32]:
        """See committee.Predict."""
        return self._answers(texts)[0]

    def tags(self, texts: Sequence[str], /) -> list[NDArray[np.float32]]:
        """See committee.PredictSlots."""
        return self._answers(texts)[1]


def load_members(folder: Path) -> list[Member]:
    """Load all models in a folder.

    Raises:
        ValueError: there are fewer than two, or they have other labels.
    """
    folders = sorted(each for each in folder.glob("*") if each.is_dir())
    if len(folders) < 2:
        what = f"{folder}: has {len(folders)} models: a committee must have at least two"
        raise ValueError(f"{what}; train more with train_ssl.py")
    models = [load_model(each) for each in folders]
    for name, model in zip(folders, models, strict=True):
        if model.labels != models[0].labels:
            what = f"{name} has other labels than {folders[0]}: all members must have the same"
            raise ValueError(f"{what}; train them on the same train.jsonl")
    return [Member(model) for model in models]


def _counted(batches: Iterable[Batch]) -> Iterator[Batch]:
    with tqdm(desc="the committee answers", unit="utt") as bar:
        for batch in batches:
            yield batch
            bar.update(batch.probabilities.shape[1])


def ask(
    models: Path, pool: Path, held_out: Path, out: Path, actors: int | None = None
) -> tuple[int, int]:
    """Write pool.npz and held_out.npz, and return how many utterances each has.

    Args:
        models: the folder of the members' folders.
        actors: processes of Ray that answer the pool; None answers it in this one.
    Raises:
        ValueError: see `load_members`, committee.predictions and ray_predict.check; or a set
            cannot be read.
    """
    if actors is not None:
        ray_predict.check(actors)
    members = load_members(models)
    out.mkdir(parents=True, exist_ok=True)
    labels = members[0].model.labels
    asked = [member.intents for member in members]
    slots = [member.tags for member in members]
    tagged = load_tagged(held_out)
    labels.check(tagged, "the members' training set")
    known = {name: number for number, name in enumerate(labels.tags)}
    answers = Labels(
        [each.intent for each in tagged],
        [np.array([known[name] for name in each.tags], np.int64) for each in tagged],
    )
    texts = [each.text for each in read_jsonl(held_out)]
    batches = [texts[begin : begin + _BATCH] for begin in range(0, len(texts), _BATCH)]
    found = predictions(
        members=asked, batches=batches, intents=labels.intents, slots=slots, labels=answers
    )
    num_held_out = write_predictions(out / "held_out.npz", found, labels.intents)
    if actors is None:
        of_pool = read_batches(pool, _BATCH)
        found = predictions(members=asked, batches=of_pool, intents=labels.intents, slots=slots)
    else:
        found = ray_predict.answers(models, pool, _BATCH, actors)
    return write_predictions(out / "pool.npz", _counted(found), labels.intents), num_held_out


def main() -> int:
    """Ask a committee from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add = parser.add_argument
    add("--models", type=Path, required=True, help="the folder of the models' folders")
    add("--pool", type=Path, required=True, help="of pool_prepare.py, or JSON lines")
    add("--held-out", type=Path, required=True, help="jsonl of labelled.py")
    add("--ray-actors", type=int, metavar="N", help="processes of Ray that answer the pool")
    add("--out", type=Path, required=True)

    def program() -> None:
        args = parser.parse_args()
        torch.set_num_threads(1)
        joint.quiet_megatron()
        counts = ask(args.models, args.pool, args.held_out, args.out, args.ray_actors)
        print(f"{counts[0]:,} utterances of the pool and {counts[1]:,} held-out ones")

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
