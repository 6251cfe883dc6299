"""A section of a report: what became of a pool's utterances, and what each selection took of them.

method_report.py calls it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngrams import spoken_words
from pool_files import read_texts
from pool_prepare import REASONS

sys.path.append(str(Path(__file__).resolve().parents[1] / "nlu_teacher"))

from pool import fingerprint


def _read(path: Path, maker: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as exc:
        what = f"cannot be read ({type(exc).__name__}: {exc}): must be there"
        raise ValueError(f"{path}: {what}; write it with {maker}") from exc


def _ngrams(words: Sequence[Sequence[str]], order: int) -> int:
    """Count the different n-grams of utterances."""
    return len({tuple(w[i : i + order]) for w in words for i in range(len(w) - order + 1)})


def pool_section(prepared: Path, selections: dict[str, Path], mixed_in: Path | None) -> list[str]:
    """Return the lines of the section.

    Args:
        prepared: a folder of pool_prepare.py.
        selections: folders of select_pool.py, by name.
        mixed_in: the pool's utterances of another domain, where they are known.
    Raises:
        ValueError: a file is missing.
    """
    record = _read(prepared / "pool.json", "pool_prepare.py")
    text = ["", "## The pool", "", "| what became of an utterance | utterances |", "| --- | ---: |"]
    text += [f"| {name.replace('_', ' ')} | {record[name]:,} |" for name in REASONS]
    text.append(f"| all | {record['read']:,} |")
    if found := record["domain_filter"]:
        text += ["", "The domain filter's cross-validation: recall {recall:.3f}, precision "]
        text[-1] += "{precision:.3f}, and {false_positive_rate:.3f} of other text stays."
        text[-1] = text[-1].format(**found)
    others = {fingerprint(each) for each in read_texts(mixed_in)} if mixed_in else None
    text += ["", "| selection | utterances | words | of another domain | 3-grams |"]
    text.append("| --- | ---: | ---: | ---: | ---: |")
    pools = {"the pool, cleaned": prepared / "pool.arrow"}
    pools |= {name: folder / "selection.jsonl" for name, folder in selections.items()}
    for name, path in pools.items():
        texts = read_texts(path)
        words = [spoken_words(each) for each in texts]
        mean = sum(map(len, words)) / len(words)
        share = "-"
        if others is not None:
            share = f"{sum(fingerprint(each) in others for each in texts) / len(texts):.3f}"
        text.append(f"| {name} | {len(texts):,} | {mean:.1f} | {share} | {_ngrams(words, 3):,} |")
    for name, folder in selections.items():
        chosen = _read(folder / "selection.json", "select_pool.py")
        for kind, each in chosen.get("thresholds", {}).items():
            text += ["", f"`{name}`: {kind} up to {each['value']:.4g} nats are admitted, of which "]
            text[-1] += f"{each['rate']:.3f} are wrong on the held-out set."
    return text
