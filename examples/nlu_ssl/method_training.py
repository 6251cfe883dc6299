"""Train a model by a method: the unlabelled pool, the losses on it, and the loop.

Each step has a labelled batch. PL, KD and VAT add their loss on an unlabelled batch to that of the
labels, and both are one update. CVT makes a second update of the unlabelled batch, as its batches
alternate.
"""

import csv
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

import cvt
import torch
import vat
from finetune_nlu import (
    CLIP_NORM,
    Data,
    Diverged,
    Evaluations,
    Settings,
    batches,
    few_shot,
    learning_rate,
    make_optimizer,
    state_bytes,
)
from joint import tagged_text
from labelled import Malformed
from labels import Encoded, LabelSet, Tagged
from losses_ssl import (
    Losses,
    SoftTargets,
    Temperatures,
    distillation_loss,
    has_intents,
    has_tags,
    label_loss,
)
from method_rows import SCORES, TAUGHT, Run
from metrics import count_all, rates
from models import Batch, NluModel, Prediction
from pool_files import read_texts
from torch import Tensor


@dataclass(frozen=True)
class SslSettings(Settings):
    """What all runs of a study share.

    Attributes:
        unlabelled_weight: of the losses on the pool.
        temperature, tag_temperature: KD's, of the student, for the intent and for the tags.
        teacher_temperature: KD's, of the teacher for both; None for those of the student.
        min_confidence: a teacher's, below which PL and KD leave out an utterance of the pool.
        window: see models.EncoderModel.
    """

    unlabelled_batch_size: int = 32
    unlabelled_weight: float = 1.0
    temperature: float = 2.0
    tag_temperature: float = 0.5
    teacher_temperature: float | None = None
    min_confidence: float = 0.0
    xi: float = vat.VatSettings.xi
    epsilon: float = vat.VatSettings.epsilon
    k_best: int = vat.VatSettings.k_best
    window: int = 1

    @property
    def temperatures(self) -> Temperatures:
        """KD's, of the student."""
        return Temperatures(self.temperature, self.tag_temperature)

    @property
    def teacher_temperatures(self) -> Temperatures:
        """KD's, of the teacher."""
        same = self.teacher_temperature
        return self.temperatures if same is None else Temperatures(same, same)

    @property
    def vat(self) -> vat.VatSettings:
        """VAT's part."""
        return vat.VatSettings(self.xi, self.epsilon, self.k_best)


# --- the pool -----------------------------------------------------------------------------------


def read_pool(path: Path) -> list[Tagged]:
    """Read unlabelled utterances: JSON lines or Arrow with a "text"; other keys are not read.

    Utterances of which nothing is spoken are left out.

    Raises:
        ValueError: it cannot be read or has labels, or no utterance is left.
    """
    texts = read_texts(path)
    utterances = (
        tagged_text(text, f"{path}, utterance {number}") for number, text in enumerate(texts, 1)
    )
    pool = [each for each in utterances if each.words]
    if not pool:
        what = f"no utterance with a spoken word among {len(texts)}: must have one or more"
        raise ValueError(f"{path}: {what}; select from a larger pool, or with a milder filter")
    return pool


def check_apart(pool: Iterable[Tagged], evaluated: dict[str, Sequence[Tagged]]) -> None:
    """Refuse a pool with an utterance that is evaluated on.

    Raises:
        Malformed: one is, in its spoken form.
    """
    places = {
        each.words: f"{name} ({each.place})" for name, sets in evaluated.items() for each in sets
    }
    for each in pool:
        if found := places.get(each.words):
            what = f"{' '.join(each.words)!r} is in the set {found}"
            rule = "a pool must have no utterance that is evaluated on"
            raise Malformed(each.place, what, rule, "select again, and leave it out")


def first_of(pool: Sequence[Tagged], size: int, name: str) -> list[Tagged]:
    """Return the first utterances of a pool, all if 0.

    Raises:
        ValueError: it has fewer.
    """
    if size > len(pool):
        what = f"--pool-sizes {size}: pool {name!r} has {len(pool)} utterances"
        raise ValueError(f"{what}; give at most that many, or 0 for all")
    return list(pool[: size or None])


def fitting(model: NluModel, pool: Sequence[Tagged]) -> tuple[list[Tagged], list[Encoded]]:
    """Return the utterances that a model can read, and their sub-words.

    Raises:
        ValueError: it can read none.
    """
    kept, encoded = [], []
    for each in pool:
        try:
            encoded.append(model.encode(each.words, each.place))
        except Malformed:
            continue
        kept.append(each)
    if not kept:
        what = f"the model can read none of the pool's {len(pool)} utterances"
        raise ValueError(f"{what}: each has more than {model.max_length} sub-words; split them")
    return kept, encoded


# --- a teacher's answers ------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of an utterance.

    Attributes:
        intent: number of the most likely one.
        tags: numbers of the most likely ones, of each word; none if the task has no tags.
        soft: log-probabilities at the teacher's temperatures: (intents,), (words, tags).
        confidence: of the task; the probability of the intent, and the geometric mean over words of
            the most likely tag's. The lower one, if the task is both.
    """

    intent: int
    tags: list[int]
    soft: tuple[Tensor, Tensor]
    confidence: float


def check_teacher(teacher: LabelSet, student: LabelSet, source: str) -> None:
    """Refuse a teacher that answers with other labels than the student's.

    Raises:
        ValueError: an intent or a tag differs.
    """
    for kind in ("intents", "tags"):
        theirs, ours = getattr(teacher, kind), getattr(student, kind)
        if theirs != ours:
            alone = sorted(set(theirs) ^ set(ours))[:5]
            what = f"the teacher {source} has {len(theirs)} {kind}, the student {len(ours)}"
            rule = f"they must be the same, and differ in {alone}"
            if not alone:
                rule = "they must be the same, and are in another order"
            raise ValueError(f"{what}: {rule}; train the teacher on the same train.jsonl")


def teach(
    teacher: NluModel,
    pool: Sequence[Tagged],
    task: str,
    temperatures: Temperatures,
    on_utterances: Callable[[int], None] = lambda num: None,
) -> list[Lesson]:
    """Return what a teacher says of each utterance of a pool.

    Raises:
        ValueError: it says something that is no number, or cannot read an utterance.
    """
    encoded = [teacher.encode(each.words, each.place) for each in pool]
    lessons: dict[int, Lesson] = {}
    for chosen, prediction in teacher.predictions(encoded):
        intents, soft_intents = (
            prediction.intent_log_probs(each) for each in (1.0, temperatures.intents)
        )
        best_intents = prediction.intents.argmax(-1).tolist()
        tags = soft_tags = prediction.tags[:, :0]
        best_tags: list[list[int]] = [[]] * len(chosen)
        if has_tags(task):
            tags, soft_tags = (prediction.tag_log_probs(each) for each in (1.0, temperatures.tags))
            best_tags = teacher.best_tags(prediction).tolist()
        for row, index in enumerate(chosen):
            num = len(pool[index].words)
            certain = []
            if has_intents(task):
                certain.append(intents[row].max().exp().item())
            if has_tags(task):
                certain.append(tags[row, :num].amax(-1).mean().exp().item())
            if not all(math.isfinite(each) for each in certain):
                what = f"the teacher's confidence of {' '.join(pool[index].words)!r} is {certain}"
                remedy = "train the teacher again, at a lower rate"
                raise ValueError(f"{pool[index].place}: {what}: must be a number; {remedy}")
            lessons[index] = Lesson(
                best_intents[row],
                best_tags[row][:num],
                (soft_intents[row].clone(), soft_tags[row, :num].clone()),
                min(certain),
            )
        on_utterances(len(chosen))
    return [lessons[index] for index in range(len(pool))]


# --- the methods --------------------------------------------------------------------------------


class Method(Protocol):
    """A loss on the pool."""

    alternates: bool
    """Whether its batches are updates of their own."""

    num_utterances: int

    def params(self) -> list[torch.nn.Parameter]:
        """Return parameters beside the model's."""

    def losses(self, model: NluModel, chosen: Sequence[int]) -> dict[str, Losses]:
        """Return the losses of some utterances by their names; their sum is learned from."""


class PseudoLabels:
    """PL: a teacher's labels, as if they were right."""

    alternates = False

    def __init__(self, encoded: Sequence[Encoded], lessons: Sequence[Lesson], task: str) -> None:
        self.encoded, self.lessons, self.task = encoded, lessons, task
        self.num_utterances = len(encoded)

    def params(self) -> list[torch.nn.Parameter]:
        """Return none."""
        return []

    def losses(self, model: NluModel, chosen: Sequence[int]) -> dict[str, Losses]:
        """See Method."""
        batch = model.batch([self.encoded[index] for index in chosen])
        lessons = [self.lessons[index] for index in chosen]
        labels = label_tensors(
            [each.intent for each in lessons], [each.tags for each in lessons], model.device
        )
        return {"pl": label_loss(model(batch), *labels, self.task)}


class Distillation(PseudoLabels):
    """KD: a teacher's probabilities of all labels, at a temperature."""

    def __init__(
        self,
        encoded: Sequence[Encoded],
        lessons: Sequence[Lesson],
        task: str,
        temperatures: Temperatures,
    ) -> None:
        super().__init__(encoded, lessons, task)
        self.temperatures = temperatures

    def losses(self, model: NluModel, chosen: Sequence[int]) -> dict[str, Losses]:
        """See Method."""
        batch = model.batch([self.encoded[index] for index in chosen])
        soft = [self.lessons[index].soft for index in chosen]
        tags = torch.nn.utils.rnn.pad_sequence([each[1] for each in soft], batch_first=True)
        targets = SoftTargets(torch.stack([each[0] for each in soft]), tags)
        return {"kd": distillation_loss(model(batch), targets, self.temperatures, self.task)}


class VirtualAdversarial:
    """VAT: see vat.py."""

    alternates = False

    def __init__(
        self, encoded: Sequence[Encoded], task: str, settings: vat.VatSettings, seed: int
    ) -> None:
        self.encoded, self.task, self.settings = encoded, task, settings
        self.num_utterances = len(encoded)
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def params(self) -> list[torch.nn.Parameter]:
        """Return none."""
        return []

    def losses(self, model: NluModel, chosen: Sequence[int]) -> dict[str, Losses]:
        """See Method."""
        batch = model.batch([self.encoded[index] for index in chosen])
        return {"vat": vat.vat_loss(model, batch, self.task, self.settings, self.generator)}


class CrossView:
    """CVT: see cvt.py."""

    alternates = True

    def __init__(self, model: NluModel, encoded: Sequence[Encoded], task: str) -> None:
        self.encoded = encoded
        self.num_utterances = len(encoded)
        self.heads = cvt.AuxiliaryHeads(model, task)

    def params(self) -> list[torch.nn.Parameter]:
        """Return the auxiliary heads' parameters."""
        return list(self.heads.parameters())

    def losses(self, model: NluModel, chosen: Sequence[int]) -> dict[str, Losses]:
        """See Method."""
        batch = model.batch([self.encoded[index] for index in chosen])
        found = cvt.cvt_losses(model, self.heads, batch)
        return {f"cvt {name}": each for name, each in found.items()}


def make_method(
    run: Run,
    model: NluModel,
    pool: Sequence[Tagged],
    settings: SslSettings,
    teacher: NluModel | None,
    on_utterances: Callable[[int], None] = lambda num: None,
) -> Method:
    """Return a run's method; PL and KD ask the teacher for its answers to the pool first.

    Raises:
        ValueError: the teacher has other labels or says no numbers, or no utterance is left.
    """
    pool, encoded = fitting(model, pool)
    if run.method == "vat":
        return VirtualAdversarial(encoded, run.task, settings.vat, run.seed)
    if run.method == "cvt":
        return CrossView(model, encoded, run.task)
    assert run.method in TAUGHT and teacher is not None, run
    check_teacher(teacher.labels, model.labels, run.name)
    lessons = teach(teacher, pool, run.task, settings.teacher_temperatures, on_utterances)
    sure = [i for i, each in enumerate(lessons) if each.confidence >= settings.min_confidence]
    if not sure:
        most = max(each.confidence for each in lessons)
        what = f"--min-confidence {settings.min_confidence}: the teacher is sure of no utterance"
        raise ValueError(f"{what} of the pool; its highest confidence is {most:.3f}; give less")
    encoded, lessons = ([each[index] for index in sure] for each in (encoded, lessons))
    if run.method == "pl":
        return PseudoLabels(encoded, lessons, run.task)
    return Distillation(encoded, lessons, run.task, settings.temperatures)


# --- the labelled utterances --------------------------------------------------------------------


def label_tensors(
    intents: Sequence[int], tags: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return labels as `label_loss` takes them, padded with tag 0."""
    to = {"dtype": torch.int64, "device": device}
    most = max(map(len, tags))
    rows = [[*row] + [0] * (most - len(row)) for row in tags]
    return torch.tensor(intents, **to), torch.tensor(rows, **to)


class Examples:
    """Labelled utterances as numbers."""

    def __init__(self, model: NluModel, utterances: Sequence[Tagged]) -> None:
        intents = {name: number for number, name in enumerate(model.labels.intents)}
        tags = {name: number for number, name in enumerate(model.labels.tags)}
        self.encoded = [model.encode(each.words, each.place) for each in utterances]
        self.intents = [intents[each.intent] for each in utterances]
        self.tags = [[tags[name] for name in each.tags] for each in utterances]

    def loss(self, model: NluModel, chosen: Sequence[int], task: str) -> Losses:
        """Return the losses of some utterances."""
        batch: Batch = model.batch([self.encoded[index] for index in chosen])
        labels = label_tensors(
            [self.intents[index] for index in chosen],
            [self.tags[index] for index in chosen],
            model.device,
        )
        prediction: Prediction = model(batch)
        return label_loss(prediction, *labels, task)


def score_of(labelled: Sequence[Tagged], answers: Sequence[Tagged], task: str) -> float:
    """Return the sum of a task's errors; lower is better."""
    found = rates(count_all(labelled, answers).sum(0))
    return float(sum(found[name] for name in SCORES[task]))


# --- the loop -----------------------------------------------------------------------------------


class LossLog:
    """Each loss apart: its mean since the last evaluation, written as step, loss, part, value."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.path.write_text("step,loss,part,value\n")
        self.sums: dict[tuple[str, str], list[float]] = defaultdict(list)

    def add(self, name: str, losses: Losses) -> None:
        """Note the losses of a batch."""
        for part, value in (("intents", losses.intents), ("tags", losses.tags)):
            if value is not None:
                self.sums[name, part].append(value.item())

    def means(self) -> tuple[float, float | None]:
        """Return the mean of the labels' loss, and that of all others; None without others."""
        totals = {True: 0.0, False: 0.0}
        for (name, _), values in self.sums.items():
            totals[name == "labels"] += sum(values) / len(values)
        has_others = any(name != "labels" for name, _ in self.sums)
        return totals[True], totals[False] if has_others else None

    def flush(self, step: int) -> None:
        """Write the means, and begin again."""
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            for (name, part), values in sorted(self.sums.items()):
                writer.writerow((step, name, part, f"{sum(values) / len(values):.6g}"))
        self.sums.clear()


class Updates:
    """An optimizer with clipping, whose rate follows `learning_rate`."""

    def __init__(self, run: Run, params: list[torch.nn.Parameter], steps: int) -> None:
        self.run, self.params, self.steps = run, params, steps
        self.optimizer = make_optimizer(run.optimizer, params)

    def begin(self, step: int) -> None:
        """Set the rate of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.steps, self.run.lr)

    def update(self, loss: Tensor, step: int) -> None:
        """Take one step.

        Raises:
            Diverged: the loss is no number.
        """
        if not math.isfinite(loss.item()):
            raise Diverged(f"{self.run.name}: the loss of step {step + 1} is {loss.item()}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(
    model: NluModel,
    run: Run,
    settings: SslSettings,
    data: Data,
    method: Method | None,
    log: LossLog,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train a model, and leave the weights of its best evaluation in it.

    Returns:
        The columns of the row that only training knows.

    Raises:
        Diverged: a loss is no number.
        ValueError: an utterance is too long, or an intent has too few.
    """
    chosen = few_shot(data.train, run.shots, run.subset)
    validation = few_shot(data.validation, settings.validation_shots, run.subset, or_fewer=True)
    examples = Examples(model, chosen)
    steps = settings.max_steps if run.shots else settings.full_steps
    updates = Updates(run, model.trained() + (method.params() if method else []), steps)
    unlabelled = None
    if method is not None:
        unlabelled = batches(method.num_utterances, settings.unlabelled_batch_size, run.seed + 1)
    model.seed_dropout(run.seed)
    model.train()
    evaluations = Evaluations(model, settings, steps)
    for step, indices in enumerate(batches(len(chosen), settings.batch_size, run.seed)):
        updates.begin(step)
        losses = examples.loss(model, indices, run.task)
        log.add("labels", losses)
        loss = losses.total()
        if method is not None and unlabelled is not None:
            if method.alternates:
                updates.update(loss, step)
                loss = torch.zeros((), dtype=loss.dtype, device=loss.device)
            for name, each in method.losses(model, next(unlabelled)).items():
                log.add(name, each)
                loss = loss + settings.unlabelled_weight * each.total()
        updates.update(loss, step)
        on_step()
        if evaluations.is_due(step):
            means = log.means()
            log.flush(step + 1)
            answers = model.answer(validation, with_tags=has_tags(run.task))
            if evaluations.add(step, score_of(validation, answers, run.task)):
                break
    evaluations.restore()
    return {
        "validation_score": round(evaluations.best_score, 4),
        "best_step": evaluations.best_step,
        "steps": step + 1,
        "num_train": len(chosen),
        "num_pool": method.num_utterances if method else 0,
        "state_bytes": state_bytes(updates.optimizer),
        "supervised_loss": round(means[0], 5),
        "unlabelled_loss": "" if means[1] is None else round(means[1], 5),
    }
