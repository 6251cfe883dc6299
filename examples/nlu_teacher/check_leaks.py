"""Check that no utterance of validation or test sets is in an unlabelled dataset.

    check_leaks.py --data runs/nlu/stage1 runs/nlu/pool --against test.jsonl validation.jsonl

It compares whole lines, as written and as spoken, and ends with status 2 where it finds one. An
utterance that is a part of a longer line is not found."""

import argparse
import json
import sys
from pathlib import Path

import pool

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared.command import exit_code_of


def main() -> int:
    """Check from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="datasets")
    parser.add_argument("--against", type=Path, nargs="+", required=True, help="utterances")
    parser.add_argument("--key", default="text", help="the text of a JSON object (%(default)s)")
    parser.add_argument("--out", type=Path, help="write what was checked to this JSON file")

    def program() -> None:
        args = parser.parse_args()
        number = pool.check_no_leak(args.data, args.against, args.key)
        print(f"none of {number:,} utterances is in {', '.join(map(str, args.data))}")
        if args.out is not None:
            names = [str(path) for path in args.data]
            args.out.write_text(json.dumps({"utterances": number, "datasets": names}) + "\n")

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
