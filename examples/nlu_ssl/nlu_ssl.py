"""Train with a pool: clean it, select from it, train by a method or by the guidelines, evaluate.

    python nlu_ssl.py --labelled train.jsonl --pool pool.jsonl --method auto --out runs/ssl/mine
    python nlu_ssl.py --labelled snips=SNIPS --pool traffic.jsonl --other-domains others.jsonl \\
        --method vat --selection submodular --budget 5000 --task ic --out runs/ssl/mine

Inputs: labelled utterances and pools. --labelled is a file or folder of jsonl, as labelled.py
describes it, or NAME=PATH: snips=FOLDER, massive=FILE, home-assistant=en, or three CoNLL files,
conll=TRAIN,VALIDATION,TEST, which have entities alone (--task ner). Of a single jsonl file, up to a
fifth of each intent becomes the validation set, and as much the test set. A pool is JSON lines with
a "text", or Arrow. Outputs, in --out: a folder for each task, whose models/ has the trained model
and its card, README.md: what it is, why this method was taken, and its evaluation.

--method auto does what the guidelines of method_report.py say for about as many labelled utterances
of an intent: a method, a selection and its size, or supervised training alone. Why is printed. The
steps are those of this folder's scripts; the same command goes on where it was stopped.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

from finetune_rows import OPTIMIZERS
from labelled import read_jsonl
from method_rows import METHODS, SUPERVISED
from method_use import AUTO, choose, read_guidelines
from pipeline import Step, labelled_words, run_steps

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared.command import exit_code_of

FOLDER = Path(__file__).resolve().parent
GUIDELINES = FOLDER / "results" / "guidelines.json"
SELECTIONS = ("random", "submodular", "committee")
_MEMBERS = 4


def reader_of(value: str) -> list[str]:
    """Return the command that reads a labelled corpus, without its --out.

    Raises:
        ValueError: there is no such corpus.
    """
    name, _, source = value.partition("=")
    labelled = "../nlu_teacher/labelled.py"
    if Path(value).exists():
        return [labelled, *labelled_words(f"jsonl={value}")]
    if name == "home-assistant" and source:
        return [labelled, "--format", name, "--source", source]
    if name != "conll":
        return [labelled, *labelled_words(value)]
    files = [Path(each).resolve() for each in source.split(",")]
    if len(files) != 3 or not all(each.is_file() for each in files):
        what = "must be conll=TRAIN,VALIDATION,TEST, three files that are there"
        raise ValueError(f"--labelled {value}: {what}")
    flags = ("--train", "--validation", "--test")
    return ["conll.py", *(str(word) for pair in zip(flags, files, strict=True) for word in pair)]


class Work:
    """The steps of a task, in a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out.resolve()
        self.labelled = self.out / "labelled"
        self.cleaned = self.out / "pool" / "pool.arrow"
        self.sets = [self.labelled / f"{name}.jsonl" for name in ("train", "validation", "test")]

    def step(
        self, name: str, words: Sequence[object], inputs: Sequence[Path], output: Path
    ) -> Step:
        """Return a step whose script is in this folder, and which makes no other file in --out."""
        command = (*map(str, words), "--out", str(output))
        # A training is known by its rows; all else in its folder goes with them.
        made = output / "rows.csv" if words[0] == "train_ssl.py" else output
        return Step(name, command, tuple(inputs), (made,), (output,), FOLDER)

    def data(self) -> list[Step]:
        """Return the steps that read the corpus and clean the pool."""
        read = reader_of(self.args.labelled)
        clean: list[object] = ["pool_prepare.py", "--pool", *self.args.pool]
        clean += ["--labelled", self.sets[0], "--forbid", *self.sets[1:], "--drop-forbidden"]
        if self.args.other_domains:
            clean += ["--other-domains", *self.args.other_domains]
        given = [self.labelled, *self.args.pool, *self.args.other_domains]
        return [
            self.step("labelled", read, [], self.labelled),
            self.step("pool", clean, given, self.cleaned.parent),
        ]

    def select(self, selection: str, budget: int) -> list[Step]:
        """Return the steps that select; a committee is trained first."""
        given, out = [self.labelled, self.cleaned], self.out / f"{selection}-{budget}"
        words: list[object] = ["select_pool.py", "--method", selection, "--budget", budget]
        words += ["--labelled", self.sets[0], "--pool", self.cleaned, "--forbid", *self.sets[1:]]
        steps: list[Step] = []
        if selection == "submodular":
            words += ["--min-count", self.args.min_count]
        elif selection == "committee":
            members, answers = self.out / "members", self.out / "predictions"
            models = members / "models"
            train = [*self.training("both"), "--method", SUPERVISED, "--seeds", _MEMBERS]
            train += ["--rates", self.args.rates[-1], "--pool", self.cleaned]
            ask: list[object] = ["committee_predict.py", "--models", models, "--pool", self.cleaned]
            ask += ["--held-out", self.sets[1]]
            steps.append(self.step("members", train, given, members))
            rows = members / "rows.csv"
            steps.append(self.step("predictions", ask, [*given, rows], answers))
            given = [*given, answers]
            words += ["--predictions", answers / "pool.npz", "--rate", self.args.rate]
            words += ["--held-out", answers / "held_out.npz"]
        steps.append(self.step(out.name, words, given, out))
        return steps

    def training(self, task: str) -> list[object]:
        """Return the command of a training, without its method, pool and --out."""
        words: list[object] = ["train_ssl.py", "--labelled", self.labelled, "--task", task]
        words += ["--model", "bilstm-crf", "--shots", 0, "--subsets", 1, "--sweeps", 1]
        return [*words, "--full-steps", self.args.steps, "--optimizer", self.args.optimizer]

    def train(self, task: str, pool: Path | None, guidelines: Path | None) -> Step:
        """Return the step that trains, evaluates and writes the card."""
        words = [*self.training(task), "--method", self.args.method, "--rates", *self.args.rates]
        given = [self.labelled]
        if pool is not None:
            words += ["--pool", f"{pool.name}={pool / 'selection.jsonl'}"]
            given.append(pool)
        if guidelines is not None:
            words += ["--guidelines", guidelines]
            given.append(guidelines)
        return self.step(task, words, given, self.out / task)

    def guideline(self, task: str) -> dict[str, Any]:
        """Return the method, the selection and its size for a task, and why, if that is known.

        Raises:
            ValueError: no guideline fits.
        """
        args = self.args
        if args.method != AUTO:
            selection = "" if args.method == SUPERVISED else args.selection or "submodular"
            return {"method": args.method, "selection": selection, "pool_size": args.budget}
        counts = Counter(each.intent for each in read_jsonl(self.sets[0]))
        per_intent = counts.total() / len(counts)
        found = choose(read_guidelines(args.guidelines), task, args.optimizer, 0, per_intent)
        if found["selection"] and args.selection:
            found["selection"] = args.selection
        # A guideline is of another pool: a smaller one is taken as it is.
        kept = json.loads((self.cleaned.parent / "pool.json").read_text())["kept"]
        found["pool_size"] = args.budget or min(found["pool_size"] or kept, kept)
        return found

    def run(self) -> None:
        """Do all tasks.

        Raises:
            ValueError: something cannot be used.
            RunError: a step failed.
        """
        data = self.data()
        run_steps(data, self.out)
        for task in self.args.task:
            found = self.guideline(task)
            steps, pool = list(data), None
            if found["selection"]:
                steps += self.select(found["selection"], found["pool_size"])
                pool = steps[-1].outputs[0]
            guidelines = self.args.guidelines if self.args.method == AUTO else None
            steps.append(self.train(task, pool, guidelines))
            run_steps(steps, self.out)
            if "why" in found:
                print(f"{task}: {found['method']}, as {found['why']}")
            (card,) = (self.out / task / "models").glob(f"{found['method']}-*-full-0-0*/README.md")
            print(f"{task}: the model and its evaluation are in {card}", flush=True)


def check(args: argparse.Namespace) -> None:
    """Refuse arguments that do not fit each other.

    Raises:
        ValueError: two do not.
    """
    for path in (*args.pool, *args.other_domains):
        if not path.exists():
            raise ValueError(f"{path}: no such file: must be a pool; give JSON lines or Arrow")
    if args.method == SUPERVISED and (args.selection or args.budget):
        raise ValueError(f"--method {SUPERVISED}: must go without --selection and --budget")
    if args.budget is not None and args.budget < 1:
        raise ValueError(f"--budget {args.budget}: must be 1 or more")
    if args.method not in (AUTO, SUPERVISED) and args.budget is None:
        what = f"--method {args.method}: must have a --budget, the utterances to select"
        raise ValueError(f"{what}; give one, or --method {AUTO}")
    if args.labelled.startswith("conll=") and args.task != ["ner"]:
        raise ValueError(f"--labelled {args.labelled}: must go with --task ner; it has no intents")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; the files have whole paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--labelled", required=True, help="a file, a folder, or NAME=PATH")
    add("--pool", type=Path, nargs="+", required=True, help="unlabelled utterances")
    add("--other-domains", type=Path, nargs="+", default=[], help="text for a domain filter")
    add("--method", choices=(AUTO, *METHODS), default=AUTO, help="(%(default)s)")
    add("--task", nargs="+", choices=("ic", "ner"), default=["ic", "ner"], help="(%(default)s)")
    add("--guidelines", type=Path, default=GUIDELINES, help=f"of {AUTO} (those of results/)")
    add("--selection", choices=SELECTIONS, help="(as the guidelines say, or submodular)")
    add("--budget", type=int, help="utterances to select (as the guidelines say)")
    add("--optimizer", choices=OPTIMIZERS, default="adams", help="(%(default)s)")
    add("--rates", type=float, nargs="+", default=[5e-3, 1e-2], help="tried (%(default)s)")
    add("--steps", type=int, default=400, help="of a training, at most (%(default)s)")
    add("--min-count", type=int, default=5, help="submodular: of an n-gram (%(default)s)")
    add("--rate", type=float, default=0.1, help="committee: of mis-annotation (%(default)s)")
    add("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.pool, args.other_domains = (
        [path.resolve() for path in paths] for paths in (args.pool, args.other_domains)
    )
    args.guidelines = args.guidelines.resolve()
    return args


def main() -> int:
    """Run from the command line."""

    def program() -> None:
        args = parse()
        check(args)
        Work(args).run()

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
