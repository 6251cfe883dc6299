"""Train models for intents and slots from labelled utterances and an unlabelled pool.

    python train_ssl.py --labelled runs/nlu/snips --pool runs/ssl/selected.jsonl --method vat \\
        --task both --model bilstm-crf --out runs/ssl/vat
    python train_ssl.py --labelled runs/nlu/snips --pool random=r.jsonl --pool submodular=s.jsonl \\
        --method supervised pl kd vat cvt --task ic ner --shots 10 50 --pool-sizes 1000 4000 \\
        --model runs/nlu/S --optimizer adams adamw --rates 1e-3 2e-3 4e-3 --out runs/ssl/study

Inputs: a folder with train.jsonl, validation.jsonl and test.jsonl (labelled.py, conll.py); pools,
as JSON lines with a "text", from which the first --pool-sizes utterances are taken; and a model:
"bilstm-crf", which begins from random weights, or the folder of a pretrained encoder. Outputs, in
--out: rows.csv, losses/, predictions/, models/; method_rows.py says what is in them.

--method auto takes the method that --guidelines say, which are what method_report.py wrote about a
study, prints why, and trains that one. Each model that is kept has a README.md: its card.

PL and KD need a teacher. Without --teacher it is the supervised model of the same task, optimizer,
labelled utterances and seed, whose run is made first and has a row of its own. All other arguments
that take several values are combined with each other. If there are several --rates, --sweeps
subsets with a seed each choose one for each method, task, optimizer and number of shots, on the
first pool and size, by the validation score; --subsets times --seeds runs follow at the best one.

Training stops when the validation score, the task's error (for "both" the sum of both), has not
become better for --patience evaluations; the weights of the best one are kept. A run that is in
rows.csv is not repeated: the same command goes on where it was stopped. Runs on one process.
"""

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

import bilstm_crf
import joint
import method_training
import torch
import vocabulary
from bilstm_crf import BiLstmCrf, Sizes
from finetune_nlu import Data, Diverged, Start, read_data
from finetune_rows import OPTIMIZERS, digest, keep_settings, write_answers
from joint import POOLINGS
from labels import LabelSet, Tagged
from losses_ssl import Temperatures, has_tags
from method_rows import (
    METHODS,
    METRICS_OF,
    SUPERVISED,
    TAUGHT,
    Plan,
    Run,
    append_row,
    read_rows,
    run_of,
)
from method_training import (
    LossLog,
    SslSettings,
    check_teacher,
    first_of,
    fitting,
    make_method,
    read_pool,
    teach,
)
from method_use import AUTO, choose, model_card, read_guidelines
from metrics import METRICS, count_all, rates
from models import EncoderModel, NluModel

BILSTM = "bilstm-crf"


class Beginning(Protocol):
    """Where a run's model begins."""

    name: str

    def model(self, labels: LabelSet, settings: SslSettings, seed: int) -> NluModel:
        """Return a model with new heads."""

    def files(self) -> list[Path]:
        """Return the files that it is made of."""


@dataclass(frozen=True)
class BiLstmBeginning:
    """A BiLSTM-CRF with random weights.

    Attributes:
        tokenizer: the folder of one.
    """

    tokenizer: Path
    sizes: Sizes
    name: str = BILSTM

    def model(self, labels: LabelSet, settings: SslSettings, seed: int) -> NluModel:
        """See Beginning."""
        torch.manual_seed(seed)
        tokenizer = vocabulary.load(self.tokenizer)
        return BiLstmCrf(self.sizes, labels, tokenizer, dropout=settings.dropout)

    def files(self) -> list[Path]:
        """See Beginning."""
        return [self.tokenizer / vocabulary.FILE]


@dataclass(frozen=True)
class EncoderBeginning:
    """A pretrained encoder, or its shape alone."""

    start: Start

    @property
    def name(self) -> str:
        """The folder's name."""
        return f"{self.start.folder.resolve().name}{'-random' if self.start.is_random else ''}"

    def model(self, labels: LabelSet, settings: SslSettings, seed: int) -> NluModel:
        """See Beginning."""
        return EncoderModel(self.start.model(labels, settings, seed), window=settings.window)

    def files(self) -> list[Path]:
        """See Beginning."""
        return self.start.files()


def load_model(folder: Path) -> NluModel:
    """Load a fine-tuned model, in evaluation mode.

    Raises:
        ValueError: the folder holds none.
    """
    if (folder / bilstm_crf.FILE).is_file():
        return bilstm_crf.load(folder)
    return EncoderModel(joint.load(folder)).eval()


def train_tokenizer(
    folder: Path, data: Data, pools: Iterable[list[Tagged]], vocab_size: int
) -> None:
    """Train the BiLSTM's WordPiece on the words of the training set and of pools."""
    utterances = [*data.train, *(each for pool in pools for each in pool)]
    texts = sorted({" ".join(each.words) for each in utterances})
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary.train(texts, vocab_size).save(str(folder / vocabulary.FILE))


@dataclass(frozen=True)
class Study:
    """All that runs are made of.

    Attributes:
        pools: whole, by name.
        teacher: a folder; None for the supervised runs.
        digests: of the files that it is made of, by their names.
        why: the methods were taken.
    """

    plan: Plan
    beginning: Beginning
    settings: SslSettings
    data: Data
    pools: dict[str, list[Tagged]]
    teacher: Path | None
    out: Path
    digests: dict[str, str]
    why: str

    def teacher_of(self, run: Run, scores: dict[Run, float]) -> NluModel | None:
        """Return a run's teacher; None for a method without one.

        Raises:
            ValueError: its run has diverged.
        """
        if run.method not in TAUGHT:
            return None
        if self.teacher is not None:
            return load_model(self.teacher)
        teacher = self.plan.teacher_of(run, scores)
        if math.isinf(scores[teacher]):
            what = f"{run.name}: its teacher {teacher.name} has diverged: it must have learned"
            raise ValueError(f"{what}; give lower --rates and another --out, or a --teacher")
        return load_model(self.out / "models" / teacher.name)

    def do_run(
        self,
        run: Run,
        scores: dict[Run, float],
        on_step: Callable[[], None],
        on_utterances: Callable[[int], None],
    ) -> dict[str, Any]:
        """Train, answer the test set, and return the row; a run that diverges scores inf.

        Args:
            on_step: called after each step.
            on_utterances: called with how many more of the pool a teacher has answered.

        Raises:
            ValueError: the data, a model, or a teacher cannot be used.
        """
        clock, cpu = time.monotonic(), time.process_time()
        model = self.beginning.model(self.data.labels, self.settings, run.seed)
        row: dict[str, Any] = {"num_params": model.num_params(), "torch": torch.__version__}
        row |= {field.name: getattr(run, field.name) for field in fields(run)}
        row |= {"model": self.beginning.name, **dict.fromkeys(METRICS, "")}
        method = None
        if run.method != SUPERVISED:
            pool = first_of(self.pools[run.selection], run.pool_size, run.selection)
            teacher = self.teacher_of(run, scores)
            method = make_method(run, model, pool, self.settings, teacher, on_utterances)
        log = LossLog(self.out / "losses" / f"{run.name}.csv")
        try:
            row |= method_training.train(model, run, self.settings, self.data, method, log, on_step)
        except Diverged:
            unknown = ("best_step", "steps", "num_train", "num_pool", "state_bytes")
            row |= dict.fromkeys((*unknown, "supervised_loss", "unlabelled_loss"), "")
            row["validation_score"] = math.inf
        else:
            self._evaluate(model, run, row)
        row["wall_seconds"] = round(time.monotonic() - clock, 1)
        row["cpu_seconds"] = round(time.process_time() - cpu, 1)
        return row

    def _evaluate(self, model: NluModel, run: Run, row: dict[str, Any]) -> None:
        answers = model.answer(self.data.test, with_tags=has_tags(run.task))
        write_answers(self.out / "predictions" / run.name / "test.jsonl", answers)
        found = rates(count_all(self.data.test, answers).sum(0))
        row |= {name: round(float(found[name]), 5) for name in METRICS_OF[run.task]}
        if run.method == SUPERVISED or run.subset == run.seed == 0:
            folder = self.out / "models" / run.name
            model.save(folder)
            card = model_card(
                row,
                why=self.why,
                labels=(len(model.labels.intents), len(model.labels.tags)),
                digests=self.digests,
                settings=vars(self.settings),
                num_test=len(self.data.test),
            )
            (folder / "README.md").write_text(card)

    def go_on(self, seconds: float = math.inf) -> bool:
        """Do the runs that are not done, until `seconds` are over. Returns whether all are.

        Raises:
            ValueError: the data, a model, or existing results cannot be used.
        """
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        end = time.monotonic() + seconds
        rows = read_rows(self.out / "rows.csv")
        scores = {run_of(row): float(row["validation_score"]) for row in rows}
        plan = self.plan
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn()) as progress:
            whole = progress.add_task(
                "runs", total=plan.num_runs(), completed=plan.num_done(scores)
            )
            while (run := plan.next_run(scores)) is not None and time.monotonic() < end:
                steps = self.settings.max_steps if run.shots else self.settings.full_steps
                bar = progress.add_task(run.name, total=steps)
                pool = first_of(self.pools.get(run.selection, []), run.pool_size, run.selection)
                taught = progress.add_task(
                    "the teacher answers the pool", total=len(pool), visible=run.method in TAUGHT
                )
                row = self.do_run(
                    run,
                    scores,
                    lambda bar=bar: progress.advance(bar),  # type: ignore[misc]
                    lambda num, bar=taught: progress.advance(bar, num),  # type: ignore[misc]
                )
                progress.remove_task(taught)
                append_row(self.out / "rows.csv", row)
                scores[run] = float(row["validation_score"])
                progress.remove_task(bar)
                num_done = plan.num_done(scores)
                progress.update(whole, completed=num_done)
                figures = ", ".join(f"{name} {row[name]}" for name in METRICS_OF[run.task])
                said = f"{num_done}/{plan.num_runs()} {run.name}: {figures}"
                said += f" ({row['wall_seconds']} s)"
                progress.console.print(said, soft_wrap=True)
        return run is None


# --- the command line ---------------------------------------------------------------------------

_AT_LEAST_ONE = (
    *("batch_size", "max_steps", "full_steps", "evaluate_every", "patience"),
    *("unlabelled_batch_size", "subsets", "seeds", "sweeps", "threads", "window"),
    *("embedding_size", "hidden_size", "max_length"),
)
_VOCAB_SIZE = 4000
_OF_BILSTM = {
    "tokenizer_pool": None,
    "vocab_size": _VOCAB_SIZE,
    "embedding_size": Sizes.embedding,
    "hidden_size": Sizes.hidden,
    "max_length": Sizes.max_length,
}
_OF_ENCODER = {"pooling": SslSettings.pooling, "window": SslSettings.window}
_OVER_ZERO = (
    *("temperature", "tag_temperature", "teacher_temperature"),
    *("xi", "epsilon", "unlabelled_weight"),
)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that give no study.

    Raises:
        ValueError: a value is out of range, or two do not fit each other.
    """
    for name in _AT_LEAST_ONE:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    for name in _OVER_ZERO:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be over 0, and finite")
    for name in ("shots", "pool_sizes", "validation_shots", "k_best"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be 0 or more")
    if min(args.rates) <= 0:
        raise ValueError(f"--rates {min(args.rates)}: must be over 0")
    if not 0 <= args.dropout < 1:
        raise ValueError(f"--dropout {args.dropout}: must be in [0, 1)")
    if not 0 <= args.min_confidence <= 1:
        raise ValueError(f"--min-confidence {args.min_confidence}: must be in [0, 1]")
    for name in ("method", "task", "optimizer", "rates", "shots", "pool_sizes"):
        values = getattr(args, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{name.replace('_', '-')} {values}: must name each value once")
    if args.random and args.model == BILSTM:
        raise ValueError(f"--random: must go with an encoder's folder; {BILSTM} is random already")
    others = _OF_ENCODER if args.model == BILSTM else _OF_BILSTM
    for name, default in others.items():
        value = getattr(args, name)
        if value != default:
            what = f"--{name.replace('_', '-')} {value}: must be left out with --model {args.model}"
            raise ValueError(f"{what}, which has no such setting")
    needs_pool = [name for name in args.method if name != SUPERVISED]
    if needs_pool and not args.pool:
        raise ValueError(f"--method {needs_pool[0]}: must have a --pool to learn from; give one")
    is_read = args.model == BILSTM or args.guidelines is not None
    if args.pool and not needs_pool and not is_read:
        # The BiLSTM's tokenizer reads the pools, also for supervised runs; and guidelines may say
        # that a pool is better left alone.
        raise ValueError("--pool: must go with a method that reads it, not supervised alone")
    if args.teacher and not set(args.method) & set(TAUGHT):
        raise ValueError(f"--teacher: must go with {' or '.join(TAUGHT)}, which alone ask one")


def take_guideline(args: argparse.Namespace, data: Data) -> str:
    """Put the method that the guidelines say in the place of "auto". Returns why.

    Raises:
        ValueError: there is no guideline, or more than one is asked for.
    """
    if AUTO not in args.method:
        if args.guidelines is not None:
            raise ValueError(f"--guidelines {args.guidelines}: must go with --method {AUTO}")
        return "it was asked for"
    if args.guidelines is None:
        what = f"--method {AUTO}: must have --guidelines; give what method_report.py wrote"
        raise ValueError(f"{what}, or name a method")
    asked = [args.method, args.task, args.optimizer, args.shots]
    if any(len(each) > 1 for each in asked):
        raise ValueError(f"--method {AUTO}: must go with one task, one optimizer and one --shots")
    names = args.task[0], args.optimizer[0], args.shots[0]
    per_intent = len(data.train) / len(data.labels.intents)
    found = choose(read_guidelines(args.guidelines), *names, per_intent)
    print(f"{found['method']}: {found['why']}", flush=True)
    args.method = [found["method"]]
    return str(found["why"])


def pool_paths(values: Sequence[str]) -> dict[str, Path]:
    """Read NAME=FILE, or FILE, whose name is then the file's without its suffix.

    Raises:
        ValueError: a name is used twice, or cannot be a part of a folder's name.
    """
    found: dict[str, Path] = {}
    for text in values:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).stem, text
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"--pool {text}: must be FILE or NAME=FILE; a name has no slash")
        if name in found:
            raise ValueError(f"--pool {text}: {name!r} is there already; each must have its name")
        if not Path(path).is_file():
            raise ValueError(f"--pool {path}: no such file: must be one; write it with a selection")
        found[name] = Path(path)
    return found


def read_pools(paths: dict[str, Path], sizes: Sequence[int], data: Data) -> dict[str, list[Tagged]]:
    """Read the pools, and check that they can be learned from.

    Raises:
        ValueError: a pool is empty or too small, has labels, or utterances that are evaluated on.
    """
    evaluated = {"validation": data.validation, "test": data.test}
    pools = {}
    for name, path in paths.items():
        pools[name] = read_pool(path)
        method_training.check_apart(pools[name], evaluated)
        for size in sizes:
            first_of(pools[name], size, name)
    return pools


def try_teacher(
    folder: Path, labels: LabelSet, pools: dict[str, list[Tagged]], tasks: Sequence[str]
) -> None:
    """Have a teacher answer the first utterances of each pool, before anything is trained.

    Raises:
        ValueError: the folder holds no model, or one with other labels or answers that are no
            numbers.
    """
    teacher = load_model(folder)
    check_teacher(teacher.labels, labels, str(folder))
    for pool in pools.values():
        tried, _ = fitting(teacher, pool[:_NUM_TRIED])
        for task in tasks:
            teach(teacher, tried, task, Temperatures(1.0, 1.0))


_NUM_TRIED = 64


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, of = parser.add_argument, SslSettings
    add("--labelled", type=Path, required=True, help="the folder of train.jsonl and the others")
    add("--pool", action="append", default=[], metavar="[NAME=]FILE", help="a pool or selection")
    add("--method", nargs="+", choices=(*METHODS, AUTO), required=True)
    add("--guidelines", type=Path, help=f"what --method {AUTO} follows")
    add("--task", nargs="+", choices=tuple(METRICS_OF), default=["both"], help="(%(default)s)")
    add("--model", required=True, help=f"{BILSTM}, or an encoder's folder")
    add("--random", action="store_true", help="take the shape of the folder alone")
    add("--teacher", type=Path, help="a model's folder, in place of the supervised run's model")
    add("--out", type=Path, required=True, help="results")
    add("--optimizer", nargs="+", choices=OPTIMIZERS, default=["adams"])
    add("--rates", nargs="+", type=float, default=[2e-3], help="tried (%(default)s)")
    add("--shots", nargs="+", type=int, default=[20], help="of an intent; 0: all (%(default)s)")
    add("--pool-sizes", nargs="+", type=int, default=[0], help="0: all (%(default)s)")
    add("--subsets", type=int, default=5, help="few-shot subsets (%(default)s)")
    add("--seeds", type=int, default=1, help="of each subset (%(default)s)")
    add("--sweeps", type=int, default=Plan.sweeps, help="subsets that choose rates (%(default)s)")
    add("--batch-size", type=int, default=of.batch_size, help="labelled (%(default)s)")
    add("--unlabelled-batch-size", type=int, default=of.unlabelled_batch_size, help="(%(default)s)")
    add("--unlabelled-weight", type=float, default=of.unlabelled_weight, help="(%(default)s)")
    add("--max-steps", type=int, default=of.max_steps, help="few-shot (%(default)s)")
    add("--full-steps", type=int, default=of.full_steps, help="shots 0 (%(default)s)")
    add("--evaluate-every", type=int, default=of.evaluate_every, help="(%(default)s)")
    add("--patience", type=int, default=of.patience, help="evaluations (%(default)s)")
    add("--validation-shots", type=int, default=of.validation_shots, help="(%(default)s)")
    add("--dropout", type=float, default=of.dropout, help="(%(default)s)")
    add("--pooling", choices=POOLINGS, default=of.pooling, help="an encoder's (%(default)s)")
    add("--temperature", type=float, default=of.temperature, help="KD's, intents (%(default)s)")
    add("--tag-temperature", type=float, default=of.tag_temperature, help="KD's (%(default)s)")
    add("--teacher-temperature", type=float, help="KD's, where it is not the student's")
    add("--min-confidence", type=float, default=of.min_confidence, help="PL, KD (%(default)s)")
    add("--xi", type=float, default=of.xi, help="VAT's, of the embeddings' norm (%(default)s)")
    add("--epsilon", type=float, default=of.epsilon, help="VAT's, the same (%(default)s)")
    add("--k-best", type=int, default=of.k_best, help="VAT with a CRF; 0: marginals (%(default)s)")
    add("--window", type=int, default=of.window, help="CVT, an encoder's (%(default)s)")
    add("--tokenizer-pool", type=Path, help=f"{BILSTM}'s, in place of all pools")
    add("--vocab-size", type=int, default=_VOCAB_SIZE, help=f"{BILSTM}'s (%(default)s)")
    add("--embedding-size", type=int, default=Sizes.embedding, help=f"{BILSTM}'s (%(default)s)")
    add("--hidden-size", type=int, default=Sizes.hidden, help=f"{BILSTM}'s (%(default)s)")
    add("--max-length", type=int, default=Sizes.max_length, help=f"{BILSTM}'s (%(default)s)")
    add("--threads", type=int, default=1, help="torch's (%(default)s)")
    add(
        "--seconds", type=float, default=math.inf, help="start no run after these; 3 if any is left"
    )
    return parser


def make_study(args: argparse.Namespace) -> Study:
    """Read and check all that the arguments name.

    Raises:
        ValueError: something cannot be used.
    """
    data = read_data(args.labelled, [])
    why = take_guideline(args, data)
    check_arguments(args)
    paths = pool_paths(args.pool)
    pools = read_pools(paths, args.pool_sizes, data)
    names = {field.name for field in fields(SslSettings)}
    settings = SslSettings(**{name: value for name, value in vars(args).items() if name in names})
    methods = set(args.method)
    if methods & set(TAUGHT) and args.teacher is None:
        methods.add(SUPERVISED)
    if args.teacher is not None:
        try_teacher(args.teacher, data.labels, pools, args.task)
    plan = Plan(
        tuple(sorted(methods, key=METHODS.index)),
        *(tuple(each) for each in (args.task, args.optimizer, args.rates, args.shots)),
        tuple(paths),
        tuple(args.pool_sizes),
        args.subsets,
        args.seeds,
        args.sweeps,
    )
    sets = {f"set {name}": [args.labelled / f"{name}.jsonl"] for name in _SETS}
    files = sets | {f"pool {name}": [path] for name, path in paths.items()}
    if args.model == BILSTM:
        sizes = Sizes(args.embedding_size, args.hidden_size, args.max_length)
        texts = pools.values() if args.tokenizer_pool is None else [read_pool(args.tokenizer_pool)]
        train_tokenizer(args.out / "tokenizer", data, texts, args.vocab_size)
        beginning: Beginning = BiLstmBeginning(args.out / "tokenizer", sizes)
    else:
        beginning = EncoderBeginning(Start(Path(args.model), args.random))
    files["model"] = beginning.files()
    if args.teacher is not None:
        files["teacher"] = [path for path in args.teacher.iterdir() if path.is_file()]
    digests = {name: digest(each) for name, each in files.items()}
    begun_with = vars(settings) | digests
    begun_with |= {"name": beginning.name}
    # The tokenizer is among the model's files, whatever it is made of.
    begun_with |= {name: getattr(args, name) for name in _OF_BILSTM if name != "tokenizer_pool"}
    # A sweep is on the first pool and size, so these decide the rates of all.
    begun_with |= {"sweeps": args.sweeps, "rates": args.rates, "first pool": list(paths)[:1]}
    args.out.mkdir(parents=True, exist_ok=True)
    keep_settings(args.out / "settings.json", begun_with)
    return Study(plan, beginning, settings, data, pools, args.teacher, args.out, digests, why)


_SETS = ("train", "validation", "test")


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line. Returns 2 if the user has to change something, 3 if time is up."""
    args = _parser().parse_args(argv)
    joint.quiet_megatron()
    try:
        torch.set_num_threads(max(1, args.threads))
        is_done = make_study(args).go_on(args.seconds)
    except ValueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    return 0 if is_done else 3


if __name__ == "__main__":
    sys.exit(main())
