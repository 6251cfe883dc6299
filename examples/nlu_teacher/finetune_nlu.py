"""Fine-tune encoders for intents and slots, from few labelled utterances or from all.

    python finetune_nlu.py --model T2=runs/nlu/T2 --model S=runs/nlu/S --random S0=runs/nlu/S \\
        --data runs/nlu/snips --out runs/nlu/finetuned

Inputs: folders of encoders (pretrain_encoder.py, distil_encoder.py), and a folder with train.jsonl,
validation.jsonl and test.jsonl (labelled.py). --random takes the shape and the tokenizer of such a
folder alone, and starts from random weights. Outputs, in --out: rows.csv, predictions/, models/;
finetune_rows.py says what is in them.

For each model, optimizer and number of shots, --sweeps subsets with a seed each choose the rate by
the validation score, and --subsets times --seeds runs follow at the best one. A subset has the same
number of utterances of each intent, and so has its validation set. Training stops when the
validation score, the intent error plus the slot error, has not become better for --patience
evaluations, and the weights of the best evaluation are kept. A run that is in rows.csv is not
repeated: the same command goes on where it was stopped. If a model, a set or a setting is another
one than these rows were made with, the command is refused; with --renew it drops the rows, says how
many, and does them again. Runs on one process.
"""

import argparse
import copy
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import encoder
import joint
import torch
import vocabulary
from finetune_rows import (
    MODEL,
    OPTIMIZERS,
    Plan,
    Run,
    append_row,
    digest,
    keep_settings,
    named_path,
    read_rows,
    renew,
    run_of,
    write_answers,
)
from joint import Batch, JointModel
from labels import IGNORED, Alignment, LabelSet, Tagged, load_tagged
from metrics import METRICS, count_all, rates

from megatron_adams import AdamS

CLIP_NORM, WARMUP_SHARE = 1.0, 0.1
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.01


@dataclass(frozen=True)
class Settings:
    """What all runs of a study share.

    Attributes:
        max_steps: at which the rate is zero.
        evaluate_every: steps between two evaluations on the validation set.
        patience: how many evaluations without a better score end a run.
        validation_shots: utterances of each intent that are validated with, or fewer where an
            intent has fewer; 0 for all.
    """

    batch_size: int = 16
    max_steps: int = 600
    full_steps: int = 2000
    evaluate_every: int = 40
    patience: int = 5
    dropout: float = 0.1
    pooling: str = "mean"
    validation_shots: int = 20


@dataclass(frozen=True)
class Data:
    """The labelled sets, and further sets to be answered."""

    train: list[Tagged]
    validation: list[Tagged]
    test: list[Tagged]
    labels: LabelSet
    others: dict[str, list[Tagged]]


class Diverged(Exception):
    """The loss is no number."""


# --- data ---------------------------------------------------------------------------------------


def few_shot(
    utterances: Sequence[Tagged], shots: int, subset: int, *, or_fewer: bool = False
) -> list[Tagged]:
    """Draw `shots` utterances of each intent (all if 0), in a random order.

    Args:
        or_fewer: take all of an intent that has fewer.
    Raises:
        ValueError: an intent has fewer.
    """
    if not shots:
        return list(utterances)
    by_intent: dict[str, list[Tagged]] = defaultdict(list)
    for each in utterances:
        by_intent[each.intent].append(each)
    rng = random.Random(subset)
    chosen = []
    for intent, candidates in sorted(by_intent.items()):
        if len(candidates) < shots and not or_fewer:
            what = f"{shots} shots: intent {intent!r} has only {len(candidates)} utterances"
            raise ValueError(f"{what}; take fewer shots, or 0 for all utterances")
        chosen += rng.sample(candidates, min(shots, len(candidates)))
    rng.shuffle(chosen)
    return chosen


def read_data(folder: Path, others: Sequence[str]) -> Data:
    """Read the sets of labelled.py's folder, and those that --also names.

    Raises:
        ValueError: a file is missing or malformed, or has labels that the training set lacks.
    """
    sets, alignment = {}, Alignment()
    paths = {name: folder / f"{name}.jsonl" for name in ("train", "validation", "test")}
    paths |= dict(map(named_path, others))
    for name, path in paths.items():
        if not path.is_file():
            raise ValueError(f"{path}: no such file: write it with labelled.py")
        sets[name] = load_tagged(path, alignment)
    print(alignment, flush=True)
    labels = LabelSet.of(sets["train"])
    for name in set(paths) - {"train"}:
        labels.check(sets[name], str(paths["train"]))
    named = [sets.pop(name) for name in ("train", "validation", "test")]
    return Data(*named, labels, sets)


def batches(num: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches without end; each pass over the utterances has its own order."""
    rng = random.Random(seed)
    while True:
        order = list(range(num))
        rng.shuffle(order)
        yield from (order[begin : begin + size] for begin in range(0, num, size))


# --- training -----------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step, from 0: linear warm-up, then linearly to zero."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (steps - step) / (steps - warmup)


def make_optimizer(name: str, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return one of OPTIMIZERS; vectors (biases, LayerNorms) have no weight decay."""
    groups = [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=1e-8)
    return AdamS(groups, lr=0.0, betas=BETAS, eps=1e-8, cautious=name == "adams-cautious")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of the optimizer's tensors that are as large as a parameter."""
    return sum(
        tensor.numel() * tensor.element_size()
        for param, state in optimizer.state.items()
        for tensor in state.values()
        if torch.is_tensor(tensor) and tensor.shape == param.shape
    )


def joint_loss(model: JointModel, batch: Batch, intents: torch.Tensor, tags: torch.Tensor) -> Any:
    """Return the cross-entropy of the intents plus that of the tags, both means.

    Args:
        intents: (batch,) int64.
        tags: (batch, length) int64, IGNORED where a sub-word has no label.
    """
    intent_logits, tag_logits = model(batch.ids, batch.mask)
    loss = torch.nn.functional.cross_entropy
    return loss(intent_logits, intents) + loss(
        tag_logits.flatten(0, 1), tags.flatten(), ignore_index=IGNORED
    )


class Examples:
    """Utterances as tensors."""

    def __init__(self, model: JointModel, utterances: Sequence[Tagged]) -> None:
        intent_ids = {name: number for number, name in enumerate(model.labels.intents)}
        tag_ids = {name: number for number, name in enumerate(model.labels.tags)}
        self.device = model.pooler.weight.device
        self.encoded = [model.encode(each.words, each.place) for each in utterances]
        self.intents = [intent_ids[each.intent] for each in utterances]
        self.tags = [
            encoded.spread([tag_ids[tag] for tag in each.tags])
            for encoded, each in zip(self.encoded, utterances, strict=True)
        ]

    def batch(self, chosen: Sequence[int]) -> tuple[Batch, torch.Tensor, torch.Tensor]:
        """Return what `joint_loss` takes."""
        batch = Batch.of([self.encoded[index] for index in chosen], self.device)
        length = batch.ids.shape[1]
        rows = [self.tags[i] + [IGNORED] * (length - len(self.tags[i])) for i in chosen]
        to = {"dtype": torch.int64, "device": self.device}
        intents = torch.tensor([self.intents[index] for index in chosen], **to)
        return batch, intents, torch.tensor(rows, **to)


def score_of(labelled: Sequence[Tagged], answers: Sequence[Tagged]) -> float:
    """Return the intent error plus the slot error."""
    found = rates(count_all(labelled, answers).sum(0))
    return float(found["intent_error"] + found["slot_error"])


class Evaluated(Protocol):
    """A model whose weights are kept at an evaluation."""

    def weights(self) -> Mapping[str, torch.Tensor]:
        """Return the weights that are saved."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """As of torch.nn.Module."""


class Evaluations:
    """The evaluations of a training: which is the best one, and when it is to stop.

    Args:
        steps: of the training at most.

    Attributes:
        best_score, best_step: of the best one; lower is better, and steps count from 1.
    """

    def __init__(self, model: Evaluated, settings: Settings, steps: int) -> None:
        self.best_score, self.best_step = math.inf, 0
        self._model, self._steps = model, steps
        self._every, self._patience = settings.evaluate_every, settings.patience
        self._weights: Mapping[str, torch.Tensor] | None = None

    def is_due(self, step: int) -> bool:
        """Whether there is one after this step, which counts from 0."""
        return (step + 1) % self._every == 0 or step + 1 == self._steps

    def add(self, step: int, score: float) -> bool:
        """Add one, and return whether the training stops."""
        if score < self.best_score:
            self.best_score, self.best_step = score, step + 1
            self._weights = copy.deepcopy(self._model.weights())
        patient_until = self.best_step + self._patience * self._every
        return step + 1 == self._steps or step + 1 >= patient_until

    def restore(self) -> None:
        """Give the model the weights of the best one."""
        assert self._weights is not None
        self._model.load_state_dict(self._weights, strict=False)


def train(
    model: JointModel,
    run: Run,
    settings: Settings,
    data: Data,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Fine-tune a model, and leave the weights of its best evaluation in it.

    Returns:
        The columns of the row that only training knows.

    Raises:
        Diverged: the loss is no number.
        ValueError: an utterance is too long, or an intent has too few.
    """
    chosen = few_shot(data.train, run.shots, run.subset)
    validation = few_shot(data.validation, settings.validation_shots, run.subset, or_fewer=True)
    examples = Examples(model, chosen)
    steps = settings.max_steps if run.shots else settings.full_steps
    optimizer = make_optimizer(run.optimizer, model.trained())
    joint.seed_dropout(run.seed)
    evaluations = Evaluations(model, settings, steps)
    losses: list[float] = []
    model.train()
    for step, indices in enumerate(batches(len(chosen), settings.batch_size, run.seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, run.lr)
        loss = joint_loss(model, *examples.batch(indices))
        if not math.isfinite(loss.item()):
            raise Diverged(f"{run.name}: the loss of step {step + 1} is {loss.item()}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.trained(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        on_step()
        if evaluations.is_due(step):
            score = score_of(validation, model.answer(validation))
            if evaluations.add(step, score):
                break
    evaluations.restore()
    return {
        "validation_score": round(evaluations.best_score, 4),
        "best_step": evaluations.best_step,
        "steps": step + 1,
        "num_train": len(chosen),
        "state_bytes": state_bytes(optimizer),
        "train_loss": round(sum(losses[-10:]) / len(losses[-10:]), 4),
    }


# --- the study ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where a model of the study begins: an encoder's folder, and whether its weights are used."""

    folder: Path
    is_random: bool

    def files(self) -> list[Path]:
        """Return the files that the model is made of.

        Raises:
            ValueError: the folder holds no encoder.
        """
        encoder.Description.read(self.folder)
        files = [self.folder / encoder.FILE, self.folder / vocabulary.FILE]
        if not self.is_random:
            checkpoint = encoder.checkpoint_folder(self.folder)
            files += [path for path in checkpoint.iterdir() if path.suffix == ".distcp"]
        return files

    def model(self, labels: LabelSet, settings: Settings, seed: int) -> JointModel:
        """Return the model with new heads.

        Raises:
            ValueError: the folder holds no encoder.
        """
        head = {"pooling": settings.pooling, "dropout": settings.dropout}
        if not self.is_random:
            bare, shape, tokenizer = encoder.load_encoder(self.folder, dropout=settings.dropout)
            torch.manual_seed(seed)
            return JointModel(bare, shape, labels, tokenizer, **head)
        description = encoder.Description.read(self.folder)
        tokenizer = vocabulary.load(self.folder)
        encoder.start_single_process()
        torch.manual_seed(seed)
        return joint.build(description.shape, description.vocab_size, labels, tokenizer, **head)


def do_run(
    run: Run, start: Start, settings: Settings, data: Data, out: Path, on_step: Callable[[], None]
) -> dict[str, Any]:
    """Fine-tune, answer all sets, and return the row; a run that diverges has a score of inf."""
    clock, cpu = time.monotonic(), time.process_time()
    model = start.model(data.labels, settings, run.seed)
    row: dict[str, Any] = {"num_params": model.num_params(), "torch": torch.__version__}
    row |= {
        key: getattr(run, key) for key in ("model", "optimizer", "lr", "shots", "subset", "seed")
    }
    try:
        row |= train(model, run, settings, data, on_step)
    except Diverged:
        unknown = ("best_step", "steps", "num_train", "state_bytes", "train_loss")
        row |= dict.fromkeys((*unknown, *METRICS), "") | {"validation_score": math.inf}
    else:
        for name, utterances in {"test": data.test, **data.others}.items():
            answers = model.answer(utterances)
            write_answers(out / "predictions" / run.name / f"{name}.jsonl", answers)
            if name == "test":
                found = rates(count_all(utterances, answers).sum(0))
                row |= {metric: round(float(found[metric]), 5) for metric in METRICS}
        if run.subset == run.seed == 0:
            model.save(out / "models" / run.name)
    row["wall_seconds"] = round(time.monotonic() - clock, 1)
    row["cpu_seconds"] = round(time.process_time() - cpu, 1)
    return row


def study(
    plan: Plan,
    starts: dict[str, Start],
    settings: Settings,
    data: Data,
    out: Path,
    seconds: float = math.inf,
) -> bool:
    """Do the runs of a plan that are not done, until `seconds` are over. Returns whether all are.

    Raises:
        ValueError: the data, a model, or existing results cannot be used.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    end = time.monotonic() + seconds
    rows = read_rows(out / "rows.csv")
    scores = {run_of(row): float(row["validation_score"]) for row in rows}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        whole = progress.add_task("runs", total=plan.num_runs(), completed=plan.num_done(scores))
        while (run := plan.next_run(scores)) is not None and time.monotonic() < end:
            steps = settings.max_steps if run.shots else settings.full_steps
            bar = progress.add_task(run.name, total=steps)
            row = do_run(
                run,
                starts[run.model],
                settings,
                data,
                out,
                lambda bar=bar: progress.advance(bar),  # type: ignore[misc]
            )
            append_row(out / "rows.csv", row)
            scores[run] = float(row["validation_score"])
            progress.remove_task(bar)
            progress.update(whole, completed=plan.num_done(scores))
            figures = ", ".join(f"{name} {row[name]}" for name in METRICS)
            said = f"{run.name}: {figures} ({row['wall_seconds']} s)"
            progress.console.print(said, soft_wrap=True)
    return run is None


def digests(args: argparse.Namespace, starts: dict[str, Start]) -> dict[str, str]:
    """Return a hash of what each model and each set of utterances is now."""
    sets = {name: args.data / f"{name}.jsonl" for name in ("train", "validation", "test")}
    sets |= dict(map(named_path, args.also))
    files = {f"set {name}": [path] for name, path in sets.items()}
    return {name: digest(paths) for name, paths in files.items()} | {
        f"{MODEL}{name}": digest(start.files()) for name, start in starts.items()
    }


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse numbers that give no study.

    Raises:
        ValueError: a number is out of range.
    """
    for name in ("batch_size", "max_steps", "full_steps", "evaluate_every", "patience"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    if min(args.shots) < 0 or args.validation_shots < 0:
        raise ValueError("--shots and --validation-shots: must be 0, for all, or more")
    if min(args.subsets, args.seeds, args.sweeps, args.threads) < 1:
        raise ValueError("--subsets, --seeds, --sweeps and --threads: must be 1 or more")
    if min(args.rates) <= 0:
        raise ValueError(f"--rates {min(args.rates)}: must be over 0")
    if not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout {args.dropout}: must be in [0, 1)")
    if not args.model and not args.random:
        raise ValueError("--model or --random: must be given at least once")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="NAME=FOLDER", help="an encoder")
    add("--random", action="append", default=[], metavar="NAME=FOLDER", help="its shape alone")
    add("--data", type=Path, required=True, help="the folder of train.jsonl and the others")
    add("--also", action="append", default=[], metavar="SET=FILE", help="answer this jsonl, too")
    add("--out", type=Path, required=True, help="results")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=["adams"])
    add("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3], help="tried (%(default)s)")
    add("--shots", nargs="+", type=int, default=[20], help="of an intent; 0: all (%(default)s)")
    add("--subsets", type=int, default=5, help="few-shot subsets (%(default)s)")
    add("--seeds", type=int, default=2, help="fine-tuning seeds of each subset (%(default)s)")
    add("--sweeps", type=int, default=Plan.sweeps, help="subsets that choose rates (%(default)s)")
    add("--batch-size", type=int, default=Settings.batch_size, help="(%(default)s)")
    add("--max-steps", type=int, default=Settings.max_steps, help="few-shot (%(default)s)")
    add("--full-steps", type=int, default=Settings.full_steps, help="shots 0 (%(default)s)")
    add("--evaluate-every", type=int, default=Settings.evaluate_every, help="(%(default)s)")
    add("--patience", type=int, default=Settings.patience, help="evaluations (%(default)s)")
    add("--dropout", type=float, default=Settings.dropout, help="(%(default)s)")
    add("--pooling", choices=joint.POOLINGS, default=Settings.pooling, help="(%(default)s)")
    add("--validation-shots", type=int, default=Settings.validation_shots, help="(%(default)s)")
    add("--renew", action="store_true", help="do runs of other files or settings again")
    add("--threads", type=int, default=1, help="torch's (%(default)s)")
    add(
        "--seconds", type=float, default=math.inf, help="start no run after these; 3 if any is left"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line. Returns 2 if the user has to change something, 3 if time is up."""
    args = _parser().parse_args(argv)
    joint.quiet_megatron()
    try:
        check_arguments(args)
        starts = {name: Start(path, False) for name, path in map(named_path, args.model)}
        starts |= {name: Start(path, True) for name, path in map(named_path, args.random)}
        if len(starts) < len(args.model) + len(args.random):
            raise ValueError("--model and --random: each must have a name of its own")
        torch.set_num_threads(args.threads)
        names = ("batch_size", "max_steps", "full_steps", "evaluate_every", "patience")
        names += ("dropout", "pooling", "validation_shots")
        settings = Settings(**{name: getattr(args, name) for name in names})
        plan = Plan(
            tuple(starts),
            tuple(args.optimizers),
            tuple(args.rates),
            tuple(args.shots),
            args.subsets,
            args.seeds,
            args.sweeps,
        )
        data = read_data(args.data, args.also)
        args.out.mkdir(parents=True, exist_ok=True)
        begun_with = {**vars(settings), **digests(args, starts)}
        if args.renew and (dropped := renew(args.out, begun_with)):
            print(f"{dropped} runs were done with other files or settings, and are done again")
        keep_settings(args.out / "settings.json", begun_with)
        is_done = study(plan, starts, settings, data, args.out, args.seconds)
    except ValueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return 0 if is_done else 3


if __name__ == "__main__":
    sys.exit(main())
