"""What test_nlu_ssl_training.py runs in a forked process: it imports Megatron.

`run` writes plain numbers as JSON for the tests to look at.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
for example in ("nlu_ssl", "nlu_teacher"):
    sys.path.append(str(EXAMPLES / example))

import joint  # noqa: E402  (the example's files import each other by name)
import torch  # noqa: E402
import train_ssl  # noqa: E402
import vat  # noqa: E402
from labels import Encoded  # noqa: E402
from method_rows import read_rows  # noqa: E402
from models import EncoderModel  # noqa: E402

from tests.unit import nlu_cases  # noqa: E402

TEXTS = ("play the song of ann", "stop", "no more of the list", "i want dmitri now")


def encoder_model(folder: Path, position: str, pooling: str = "mean") -> EncoderModel:
    return EncoderModel(nlu_cases.untrained(folder, position, pooling), window=1).eval()


@torch.no_grad()
def forward_difference(folder: Path) -> dict[str, float]:
    """Compare the model's answers with those of JointModel.forward."""
    found = {}
    for position in ("rope", "learned_absolute"):
        for pooling in joint.POOLINGS:
            model = encoder_model(folder, position, pooling)
            encoded = [model.encode(text.split(), "") for text in TEXTS]
            mine = model(model.batch(encoded))
            padded = joint.Batch.of(encoded)
            intents, tags = model.joint(padded.ids, padded.mask)
            difference = (mine.intents - intents).abs().max().item()
            for row, each in enumerate(encoded):
                theirs = tags[row, list(each.firsts)]
                apart = (mine.tags[row, : len(each.firsts)] - theirs).abs().max().item()
                difference = max(difference, apart)
            found[f"{position}, {pooling}"] = difference
    return found


@torch.no_grad()
def views(folder: Path) -> list[dict[str, Any]]:
    """Change each sub-word in turn, and note which views' states at each word are equal bits."""
    notes = []
    for position in ("rope", "learned_absolute"):
        model = encoder_model(folder, position)
        encoded = model.encode(["play", "the", "song", "of", "ann", "again", "and", "again"], "")
        firsts, length = encoded.firsts, len(encoded.ids)
        ends = [first - 1 for first in firsts[1:]] + [length - 2]
        before = states(model, encoded)
        for changed in range(length):
            ids = list(encoded.ids)
            ids[changed] = 6 if ids[changed] == 5 else 5
            after = states(model, dataclasses.replace(encoded, ids=tuple(ids)))
            for name, (words, whole) in before.items():
                for word, (first, last) in enumerate(zip(firsts, ends, strict=True)):
                    seen = {
                        "forward": changed <= last,
                        "backward": changed >= first,
                        "window": abs(changed - first) <= 2,  # two layers of one place each
                    }[name]
                    is_equal = torch.equal(words[word], after[name][0][word])
                    notes.append({"view": name, "seen": seen, "equal": is_equal})
                if whole is not None:
                    half = (len(firsts) + 1) // 2
                    begin, end = firsts[len(firsts) - half], ends[half - 1]
                    seen = changed <= end if name == "forward" else changed >= begin
                    is_equal = torch.equal(whole, after[name][1])
                    notes.append({"view": f"{name}, intent", "seen": seen, "equal": is_equal})
    return notes


def states(model: EncoderModel, encoded: Encoded) -> dict[str, Any]:
    batch = model.batch([encoded, model.encode(["stop", "the", "song"], "")])
    return {
        name: (view.words[0], None if view.whole is None else view.whole[0])
        for name, view in model.views(model.embed(batch), batch).items()
        if view.words is not None
    }


def padded_views(folder: Path) -> dict[str, float]:
    """Return how far each view of the intent of an utterance is from that of it alone."""
    model = encoder_model(folder, "rope").double()
    long, short = (model.encode(text.split(), "") for text in ("play the song of ann", "stop"))
    beside, alone = (model.batch(each) for each in ([long, short], [short]))
    with torch.no_grad():
        found, expected = (model.views(model.embed(each), each) for each in (beside, alone))
    return {
        name: (found[name].whole[-1] - view.whole[-1]).abs().max().item()
        for name, view in expected.items()
        if view.whole is not None
    }


def vat_direction(folder: Path) -> dict[str, float]:
    """Compare r_adv with the gradient by finite differences, in float64, and with noise."""
    model = encoder_model(folder, "rope").double()
    batch = model.batch([model.encode(text.split(), "") for text in TEXTS])
    embedded = model.embed(batch).detach()
    with torch.no_grad():
        clean = vat.CleanAnswers(model.predict(embedded, batch), "both", 0)

    def divergence(moved: torch.Tensor) -> torch.Tensor:
        intents, tags = clean.divergences(model.predict(moved, batch))
        assert intents is not None and tags is not None
        return intents + tags

    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(embedded.shape, generator=generator, dtype=embedded.dtype, device="cpu")
    xi, epsilon, step = 0.05, 0.2, 1e-4
    r_adv = vat.adversarial(embedded, batch.mask, divergence, noise, xi=xi, epsilon=epsilon)
    shown = batch.mask.unsqueeze(-1)
    size = (embedded * shown).flatten(1).norm(dim=1)[:, None, None]
    unit = noise * shown / (noise * shown).flatten(1).norm(dim=1)[:, None, None]
    gradient = torch.zeros_like(embedded)
    with torch.no_grad():
        # All utterances at once, as none depends on another.
        for place in itertools.product(*map(range, embedded.shape[1:])):
            moved = torch.zeros_like(embedded)
            moved[:, place[0], place[1]] = step
            start = embedded + xi * size * unit
            ends = divergence(start + moved), divergence(start - moved)
            gradient[:, place[0], place[1]] = (ends[0] - ends[1]) / (2 * step)
        gradient = gradient * shown
        expected = epsilon * size * gradient / gradient.flatten(1).norm(dim=1)[:, None, None]
        adverse = divergence(embedded + r_adv)
        of_noise = divergence(embedded + epsilon * size * unit)
    return {
        "difference": float(((r_adv - expected).flatten(1).norm(dim=1) / size.flatten()).max()),
        "against_noise": float((adverse / of_noise).min()),
    }


def command(folder: Path) -> dict[str, Any]:
    """Train by each method, and with a teacher's folder of the teacher recipe."""
    data, out = folder / "data", folder / "encoder"
    texts = ["play the list of ann again", "stop the list", "more of the songs of bob please"]
    lines = [json.dumps({"text": text, "source": "made up"}) for text in texts]
    (folder / "pool.jsonl").write_text("\n".join(lines) + "\n")
    argv = f"--labelled {data} --pool {folder}/pool.jsonl --model {data}/rope --random --shots 8"
    argv += " --subsets 1 --batch-size 8 --max-steps 8 --evaluate-every 4 --validation-shots 0"
    codes = [
        train_ssl.main([*argv.split(), "--out", str(out), "--method", "pl", "kd", "vat", "cvt"])
    ]
    rows = read_rows(out / "rows.csv")
    teacher = out / "models" / "supervised-both-adams-0.002-8-0-0"
    other = ["--out", str(folder / "taught"), "--method", "pl", "--teacher", str(teacher)]
    codes.append(train_ssl.main([*argv.split(), *other]))
    taught = read_rows(folder / "taught" / "rows.csv")
    labels = json.loads((teacher / "labels.json").read_text())
    labels["intents"][0] = "Sing"
    (teacher / "labels.json").write_text(json.dumps(labels))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        codes.append(train_ssl.main([*argv.split(), *other]))
    return {"codes": codes, "rows": rows, "taught": taught, "said": said.getvalue()}


def run(folder: Path) -> None:
    """Do all of it, on one thread."""
    torch.set_num_threads(1)
    joint.quiet_megatron()
    nlu_cases.write_data(folder / "data")
    found = {
        "forward_difference": forward_difference(folder),
        "views": views(folder),
        "padded_views": padded_views(folder),
        "vat_direction": vat_direction(folder),
        "command": command(folder),
    }
    (folder / "found.json").write_text(json.dumps(found))
