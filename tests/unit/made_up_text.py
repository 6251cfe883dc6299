"""Documents for the examples' pipelines, in place of the public text that they fetch."""

import itertools
import json
import random
from pathlib import Path


def write_text(path: Path, num: int = 500) -> Path:
    """Write documents of two sentences that no utterance is like, as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    words = [f"{a}{b}" for a, b in itertools.product(("gran", "lith", "mor", "sed"), "aeiou")]
    sentences = (" ".join(rng.choices(words, k=8)).capitalize() for _ in range(2 * num))
    documents = [f"{first}. {second}." for first, second in itertools.batched(sentences, 2)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path
