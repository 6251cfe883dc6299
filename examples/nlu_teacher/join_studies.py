"""Join studies of finetune_nlu.py, each of other models, to one that the report reads.

    join_studies.py --study runs/nlu/finetuned-T1 runs/nlu/finetuned-T2 --out runs/nlu/finetuned

So the models of a pipeline are fine-tuned in processes beside each other. The studies must have
been begun with the same settings and sets, and must not have a run in common. Outputs, in --out:
all that finetune_rows.py lists."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_rows import COLUMNS, Run, keep_settings, read_rows, run_of

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import run_table
from shared.command import exit_code_of

SETTINGS, ROWS = "settings.json", "rows.csv"
FOLDERS = ("predictions", "models")


def _read(study: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    try:
        settings = json.loads((study / SETTINGS).read_text())
    except (OSError, json.JSONDecodeError) as exc:
        raise ValueError(
            f"--study {study}: is no study of finetune_nlu.py ({SETTINGS}: {exc}); run that first"
        ) from exc
    return settings, read_rows(study / ROWS)


def join(studies: Sequence[Path], out: Path) -> int:
    """Write the study, and return how many runs it has.

    Raises:
        ValueError: `out` exists, a study is none, two of them have different settings or sets, or
            two have a run in common.
    """
    if out.exists():
        raise ValueError(f"--out {out}: exists already; give a new folder, or remove it")
    read = [(study, *_read(study)) for study in studies]
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    known: dict[Run, Path] = {}
    for study, settings, rows in read:
        try:
            keep_settings(unfinished / SETTINGS, settings)
        except ValueError as exc:
            raise ValueError(f"--study {study}: {exc}") from exc
        for row in rows:
            run = run_of(row)
            if run in known:
                raise ValueError(
                    f"--study {study}: has the run {run.name}, as {known[run]} has; a run must be "
                    "in one study alone: leave one of the two out"
                )
            known[run] = study
            run_table.append_row(unfinished / ROWS, row, COLUMNS)
        for name in FOLDERS:
            if (study / name).is_dir():
                shutil.copytree(study / name, unfinished / name, dirs_exist_ok=True)
    unfinished.rename(out)
    return len(known)


def main() -> int:
    """Join from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--study", type=Path, nargs="+", required=True, help="their folders")
    parser.add_argument("--out", type=Path, required=True, help="the joined study")

    def program() -> None:
        args = parser.parse_args()
        print(f"{join(args.study, args.out)} runs in {args.out}")

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
