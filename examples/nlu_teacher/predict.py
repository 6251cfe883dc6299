"""Read utterances from stdin, a line each, and print the intent and the slots of each.

    echo "play thriller by michael jackson" | python predict.py --model runs/nlu/exported
    python predict.py --model runs/nlu/exported --benchmark --input runs/nlu/snips/test.jsonl \\
        --out runs/nlu/exported/benchmark.json

Inputs: a folder that export.py wrote, and lines of text, in written or spoken form, from stdin or a
file; of a file whose name ends in .jsonl, each line's "text". Outputs, on stdout or in --out: a
JSON object a line, {"text", "intent", "slots": [{"name", "value"}]}; with --plain the intent and
`name=value` pairs, separated by tabs. A line that cannot be answered, as it is too long or has no
word, gives {"text", "error"} with the reason. The number of such lines is said on stderr, and the
exit status is then 1.

--benchmark tells instead how long one utterance takes on the CPU, from text to slots, and how
large the model is: one utterance at a time, --threads threads, after a warm-up of ten.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import joint
import vocabulary
from joint import Batch
from labelled import read_jsonl
from labels import Encoded, LabelSet, encode, spans_of

BACKENDS = ("onnx", "transformers")
WARM_UP = 10


class Predictor:
    """An exported model.

    Args:
        backend: "onnx" or "transformers".
    Raises:
        ValueError: the folder has no exported model.
    """

    def __init__(self, folder: Path, backend: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        try:
            config = json.loads((folder / "config.json").read_text())
            self.labels = LabelSet(tuple(config["intents"]), tuple(config["tags"]))
            self.max_length = config["encoder"]["max_position_embeddings"]
        except (OSError, ValueError, KeyError) as exc:
            what = f"must be a folder that export.py wrote ({type(exc).__name__}: {exc})"
            raise ValueError(f"{folder}: {what}") from exc
        self.tokenizer = vocabulary.load(folder)
        self.weights = folder / ("model.onnx" if backend == "onnx" else "model.safetensors")
        if not self.weights.is_file():
            raise ValueError(f"{self.weights}: no such file: must be there; export the model again")
        self.answer = self._answer(folder, backend, threads)

    def _answer(self, folder: Path, backend: str, threads: int) -> Any:
        import export

        if backend == "onnx":
            return export.onnx_answer(self.weights, threads)
        from modeling_joint_nlu import JointNluModel
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        model = export.Tuple(JointNluModel.from_pretrained(folder)).eval()
        return lambda batch: export.module_answer(model, batch)

    def encode(self, text: str, place: str) -> tuple[tuple[str, ...], Encoded]:
        """Return an utterance's spoken words and sub-words.

        Raises:
            ValueError: it is too long, or has no word.
        """
        words = joint.tagged_text(text, place).words
        if not words:
            raise ValueError(f"{place}: {text!r}: must have a word in its spoken form")
        return words, encode(words, self.tokenizer, self.max_length, place)

    def predict(self, text: str, place: str) -> dict[str, Any]:
        """Return the intent and the slots of an utterance.

        Raises:
            ValueError: it is too long, or has no word.
        """
        words, encoded = self.encode(text, place)
        intents, tags = self.answer(Batch.of([encoded]))
        names = [self.labels.tags[number] for number in encoded.gather(tags[0].argmax(-1).tolist())]
        slots = [
            {"name": name, "value": " ".join(words[start:end])}
            for name, start, end in spans_of(names)
        ]
        intent = self.labels.intents[int(intents[0].argmax())]
        return {"text": text, "intent": intent, "slots": slots}

    def size(self) -> dict[str, int]:
        """Return the bytes of the weights' file and the number of parameters."""
        from safetensors import safe_open

        with safe_open(self.weights.parent / "model.safetensors", "np") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        numel = 0
        for shape in shapes:
            count = 1
            for each in shape:
                count *= each
            numel += count
        return {"file_bytes": self.weights.stat().st_size, "parameters": numel}


def predictions(predictor: Predictor, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield an answer, or an error, for each line that is not empty."""
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text:
            continue
        try:
            yield predictor.predict(text, f"line {number}")
        except ValueError as exc:
            yield {"text": text, "error": str(exc)}


def as_plain(answer: dict[str, Any]) -> str:
    """Return an answer as the intent and its slots, separated by tabs."""
    if "error" in answer:
        return f"error\t{answer['error']}"
    return "\t".join(
        [answer["intent"], *(f"{slot['name']}={slot['value']}" for slot in answer["slots"])]
    )


def read_lines(path: Path | None) -> Iterable[str]:
    """Return the utterances of a file, or of stdin.

    Raises:
        ValueError: the file is missing, or a line of jsonl is malformed.
    """
    if path is None:
        return sys.stdin
    if not path.is_file():
        raise ValueError(f"{path}: no such file: must have an utterance a line")
    if path.suffix == ".jsonl":
        return [utterance.text for utterance in read_jsonl(path)]
    return path.read_text("utf-8").splitlines()


def benchmark(predictor: Predictor, lines: Iterable[str]) -> dict[str, float]:
    """Return the milliseconds that one utterance takes, and the model's size.

    Raises:
        ValueError: an utterance cannot be answered, or there are too few.
    """
    texts = [line.strip() for line in lines if line.strip()]
    if len(texts) < 2 * WARM_UP:
        raise ValueError(f"{len(texts)} utterances: --benchmark needs {2 * WARM_UP} or more")
    times = []
    for number, text in enumerate(texts, 1):
        start = time.perf_counter()
        predictor.predict(text, f"line {number}")
        times.append(1000 * (time.perf_counter() - start))
    times = times[WARM_UP:]
    return {
        "utterances": len(times),
        "median_ms": statistics.median(times),
        "p95_ms": statistics.quantiles(times, n=20)[-1],
        **predictor.size(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line. Returns 2 if the user has to change something."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a folder that export.py wrote")
    parser.add_argument("--backend", choices=BACKENDS, default="onnx", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--plain", action="store_true", help="tabs instead of JSON")
    parser.add_argument("--benchmark", action="store_true", help="tell times and sizes instead")
    parser.add_argument("--input", type=Path, help="a file of utterances, in place of stdin")
    parser.add_argument("--out", type=Path, help="a file for the answers, in place of stdout")
    args = parser.parse_args(argv)
    try:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}: must be 1 or more")
        lines = read_lines(args.input)
        predictor = Predictor(args.model, args.backend, args.threads)
        if args.benchmark:
            record = json.dumps(benchmark(predictor, lines)) + "\n"
            args.out.write_text(record) if args.out else sys.stdout.write(record)
            return 0
    except ValueError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    failed = 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(args.out.open("w")) if args.out else sys.stdout
        for answer in predictions(predictor, lines):
            failed += "error" in answer
            text = as_plain(answer) if args.plain else json.dumps(answer, ensure_ascii=False)
            print(text, file=file, flush=True)
    if failed:
        print(f"{failed} lines were not answered; each says why", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
