"""What test_nlu_finetune.py runs in a forked process: it imports Megatron, starts a process group.

Each function returns plain numbers, and `run` writes them as JSON for the tests to look at.
"""

import argparse
import itertools
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nlu_teacher"
sys.path.append(str(EXAMPLE))

import encoder  # noqa: E402  (the example's files import each other by name)
import finetune_nlu  # noqa: E402
import joint  # noqa: E402
import labelled  # noqa: E402
import torch  # noqa: E402
import vocabulary  # noqa: E402
from finetune_nlu import Start  # noqa: E402
from finetune_rows import Run, read_answers, read_rows  # noqa: E402

NAMES = ("ann", "bob", "carla", "dmitri", "eve", "frank")
THINGS = ("song", "list", "movie", "station")
FRAMES = {
    "Play": ("play the [thing : {t}] of [name : {n}]", "i want [name : {n}] now"),
    "Stop": ("stop the [thing : {t}] with [name : {n}]", "no more of the [thing : {t}]"),
}


def write_data(folder: Path) -> None:
    """Write labelled sets of two intents, and encoders' folders without weights."""
    utterances = sorted(
        {
            labelled.parse_brackets(frame.format(t=thing, n=name), intent, "")
            for intent, frames in FRAMES.items()
            for frame, thing, name in itertools.product(frames, THINGS, NAMES)
        },
        key=lambda each: each.text,
    )
    random.Random(0).shuffle(utterances)
    folder.mkdir()
    for name, part in {"train": utterances[24:], "validation": utterances[:12]}.items():
        labelled.write_jsonl(folder / f"{name}.jsonl", part)
    labelled.write_jsonl(folder / "test.jsonl", utterances[12:24])
    tokenizer = vocabulary.train([each.text for each in utterances], 60)
    for position in encoder.POSITIONS:
        place = folder / position
        place.mkdir()
        tokenizer.save(str(place / vocabulary.FILE))
        shape = encoder.Shape(2, 32, 2, 64, 32, position)
        size = tokenizer.get_vocab_size()
        encoder.Description(shape, size, vocabulary.digest(place)).write(place)


SETTINGS = finetune_nlu.Settings(
    batch_size=8, max_steps=80, evaluate_every=20, validation_shots=0, dropout=0.1
)
COMMAND = "--shots 8 --subsets 1 --batch-size 8 --max-steps 80 --evaluate-every 20"


def study(folder: Path) -> dict[str, Any]:
    """Do a study in two goes, and one of its runs again alone."""
    data, out = folder / "data", folder / "study"
    argv = f"--random S={data}/rope --data {data} --out {out} {COMMAND} --validation-shots 0"
    argv += f" --rates 5e-3 --optimizers adams adamw --also more={data}/validation.jsonl"
    codes = [finetune_nlu.main([*argv.split(), "--seeds", "2", "--seconds", "0"])]
    codes += [finetune_nlu.main([*argv.split(), "--seeds", seeds]) for seeds in ("1", "2")]
    rows = read_rows(out / "rows.csv")
    codes.append(finetune_nlu.main([*argv.split(), "--seeds", "2"]))
    again = read_rows(out / "rows.csv")
    codes.append(finetune_nlu.main([*argv.split(), "--seeds", "2", "--dropout", "0.2"]))
    read = finetune_nlu.read_data(data, [])
    run = Run("S", "adamw", 5e-3, 8, 0, 1)
    start = Start(data / "rope", True)
    alone = finetune_nlu.do_run(run, start, SETTINGS, read, folder / "alone", lambda: None)
    asked = {"test": read.test, "more": read.validation}
    saved = out / "models" / "S-adams-0.005-8-0-0"
    model = joint.load(saved)
    same = {
        name: model.answer(utterances, batch_size=5)
        == [
            replace(answer, place=each.place)
            for answer, each in zip(
                read_answers(out / "predictions" / saved.name / f"{name}.jsonl", utterances),
                utterances,
                strict=True,
            )
        ]
        for name, utterances in asked.items()
    }
    return {"codes": codes, "rows": rows, "again": again == rows, "alone": alone, "same": same}


def untrained(folder: Path, position: str = "rope", pooling: str = "mean") -> joint.JointModel:
    data = finetune_nlu.read_data(folder / "data", [])
    settings = replace(SETTINGS, pooling=pooling)
    model = Start(folder / "data" / position, True).model(data.labels, settings, 3)
    # Heads and biases that begin at zero would hide what is exchanged.
    torch.manual_seed(5)
    with torch.no_grad():
        for param in model.trained():
            param += 0.1 * torch.randn_like(param)
    return model.eval()


def loss(folder: Path) -> dict[str, float]:
    """Compare the loss with one that is computed word by word, in float64."""
    model = untrained(folder)
    data = finetune_nlu.read_data(folder / "data", [])
    chosen = data.train[:5]
    examples = finetune_nlu.Examples(model, chosen)
    batch, intents, tags = examples.batch(range(5))
    with torch.no_grad():
        mine = finetune_nlu.joint_loss(model, batch, intents, tags).item()
    of_intents, of_words = [], []
    for each in chosen:
        encoded = model.encode(each.words, each.place)
        ids = torch.tensor([encoded.ids], dtype=torch.int64, device=torch.device("cpu"))
        with torch.no_grad():
            logits = [x[0].double() for x in model(ids, torch.ones_like(ids))]
        scores = logits[0].log_softmax(-1)
        of_intents.append(-scores[model.labels.intents.index(each.intent)].item())
        for place, name in zip(encoded.firsts, each.tags, strict=True):
            of_words.append(-logits[1][place].log_softmax(-1)[model.labels.tags.index(name)].item())
    oracle = sum(of_intents) / len(of_intents) + sum(of_words) / len(of_words)
    return {"mine": mine, "oracle": oracle}


def stops(folder: Path) -> dict[str, Any]:
    """Train with a loss that is no number, and with one evaluation's patience."""
    data = finetune_nlu.read_data(folder / "data", [])
    start = Start(folder / "data" / "rope", True)
    run = Run("S", "adams", 1e-12, 8, 0, 1)  # so slow that nothing becomes better
    settings = replace(SETTINGS, evaluate_every=5, patience=2)
    slow = finetune_nlu.do_run(run, start, settings, data, folder / "slow", lambda: None)
    real = finetune_nlu.joint_loss
    finetune_nlu.joint_loss = lambda *args: real(*args) * math.nan
    try:
        diverged = finetune_nlu.do_run(run, start, settings, data, folder / "nan", lambda: None)
    finally:
        finetune_nlu.joint_loss = real
    return {"slow": slow, "diverged": diverged, "best": best_weights(start, data)}


def best_weights(start: Start, data: finetune_nlu.Data) -> dict[str, bool]:
    """Train on after the evaluation that is said to be the best."""
    seen: list[list[Any]] = []

    def first_is_best(labelled: Any, answers: Any) -> float:
        seen.append(answers)
        return float(len(seen))

    model = start.model(data.labels, SETTINGS, 0)
    real, finetune_nlu.score_of = finetune_nlu.score_of, first_is_best
    try:
        finetune_nlu.train(model, Run("S", "adams", 5e-3, 8, 0, 0), SETTINGS, data)
    finally:
        finetune_nlu.score_of = real
    again = model.answer(finetune_nlu.few_shot(data.validation, 0, 0))
    return {"is_first": again == seen[0], "is_last": again == seen[-1]}


def long_utterance(folder: Path) -> str:
    """Fine-tune with an utterance that the encoder cannot read."""
    data = folder / "long"
    data.mkdir()
    for name in ("train", "validation", "test"):
        text = (folder / "data" / f"{name}.jsonl").read_text()
        (data / f"{name}.jsonl").write_text(text)
    utterance = labelled.parse_brackets("play " * 40, "Play", "")
    labelled.write_jsonl(data / "test.jsonl", [utterance])
    read = finetune_nlu.read_data(data, [])
    model = untrained(folder)
    try:
        model.answer(read.test)
    except ValueError as exc:
        return str(exc)
    return "no error"


def transformers_difference(folder: Path) -> dict[str, Any]:
    """Compare the logits of the exported model with Megatron's, in batches with padding."""
    import export
    from labels import load_tagged

    utterances = load_tagged(folder / "data" / "train.jsonl")[:9]
    found: dict[str, Any] = {}
    for position, pooling in zip(encoder.POSITIONS, joint.POOLINGS, strict=True):
        model = untrained(folder, position, pooling)
        encoded = [model.encode(each.words, each.place) for each in utterances]
        batches = [joint.Batch.of(encoded[:1]), joint.Batch.of(encoded[1:])]
        other = export.Tuple(export.to_transformers(model)).eval()
        difference = export.largest_difference(
            lambda batch, model=model: export.module_answer(model, batch),
            lambda batch, other=other: export.module_answer(other, batch),
            batches,
        )
        spread = [float(x.std(axis=0).min()) for x in export.module_answer(other, batches[1])]
        found[position] = {"difference": difference, "spread": min(spread)}
    model.encoder.config.bias_activation_fusion = True
    try:
        export.config_of(model)
    except ValueError as exc:
        found["refused"] = str(exc)
    return found


def run(folder: Path) -> None:
    """Do all, and write what came out."""
    joint.quiet_megatron()
    torch.set_num_threads(1)
    write_data(folder / "data")
    found = {
        each.__name__: each(folder)
        for each in (study, loss, stops, long_utterance, transformers_difference)
    }
    (folder / "found.json").write_text(json.dumps(found))


def export_whole(folder: Path) -> None:
    """Export a model by the command, with ONNX, and answer with both forms."""
    import export
    import predict

    joint.quiet_megatron()
    write_data(folder / "data")
    found: dict[str, Any] = {}
    check = folder / "data" / "test.jsonl"
    for position in encoder.POSITIONS:
        model, out = untrained(folder, position), folder / f"exported-{position}"
        model.save(folder / f"saved-{position}")
        argv = ["--model", str(folder / f"saved-{position}"), "--out", str(out)]
        code = export.main([*argv, "--check", str(check)])
        lines = ["play the song of ann", "", "...", "play " * 40]
        answers = {
            backend: list(predict.predictions(predict.Predictor(out, backend, 1), lines))
            for backend in predict.BACKENDS
        }
        texts = [each["text"] for each in map(json.loads, check.read_text().splitlines())]
        speed = predict.benchmark(predict.Predictor(out, "onnx", 1), texts * 2)
        (said,) = model.answer([joint.tagged_text(lines[0], "x:1")])
        words = {name: " ".join(said.words[a:b]) for name, a, b in said.spans}
        found[position] = {
            "code": code,
            "record": json.loads((out / "export.json").read_text()),
            "answers": answers,
            "megatron": [said.intent, words],
            "speed": speed,
            "parameters": model.num_params(),
        }
    found["auto"] = of_transformers_alone(model, out)
    export.TOLERANCE, export.to_onnx = -1.0, lambda model, path: None  # the file is there
    found["intolerant"] = export.main([*argv, "--check", str(check)])
    (folder / "found.json").write_text(json.dumps(found))


def of_transformers_alone(model: joint.JointModel, exported: Path) -> float:
    """Load an export as its user does, and return the largest difference of an intent's logit."""
    from transformers import AutoModel, AutoTokenizer

    theirs = AutoModel.from_pretrained(exported, trust_remote_code=True).eval()
    assert not isinstance(theirs, sys.modules["modeling_joint_nlu"].JointNluModel)
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    texts = ["play the song of ann", "no more of the list"]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    encoded = [model.encode(text.split(), "x:1") for text in texts]
    batch = joint.Batch.of(encoded)
    with torch.no_grad():
        output = theirs(given["input_ids"], given["attention_mask"])
        return float((output.intent_logits - model(batch.ids, batch.mask)[0]).abs().max())


def main() -> None:
    """Run from the command line, to look at what comes out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    run(parser.parse_args().folder)


if __name__ == "__main__":
    main()
