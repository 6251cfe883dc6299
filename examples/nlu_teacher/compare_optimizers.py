"""Compare AdamS with AdamW in pretraining: loss curves, and bytes of the optimizer's state.

    compare_optimizers.py --run AdamS=runs/nlu/adams --run AdamW=runs/nlu/adamw --out FOLDER

Inputs: folders of run_training.py. Outputs: optimizers.md and optimizers.png."""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared.command import exit_code_of

# One for each run, from the first again after the last.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MIB = 2**20

Curves = dict[str, dict[str, Any]]


def read(runs: list[str]) -> Curves:
    """Read the curves of runs that are given as NAME=FOLDER.

    Raises:
        ValueError: a run is not given so, or has no curve.
    """
    curves: Curves = {}
    for run in runs:
        name, _, folder = run.partition("=")
        try:
            curves[name] = json.loads((Path(folder) / "curve.json").read_text())
        except (OSError, json.JSONDecodeError) as exc:
            raise ValueError(
                f"--run {run}: must be NAME=FOLDER with a folder of run_training.py ({exc})"
            ) from exc
    return curves


def state_bytes(curve: dict[str, Any]) -> dict[str, int]:
    """Return the bytes of each of the optimizer's moments; the parameters are not among them."""
    return {kind: size for kind, size in curve["optimizer_bytes"].items() if kind != "param"}


def table(curves: Curves) -> str:
    """Return a Markdown table, a row a run."""
    lines = ["| optimizer | held-out loss (nats) | state | of which | seconds |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, curve in curves.items():
        state = state_bytes(curve)
        parts = ", ".join(f"{kind} {size / _MIB:.2f} MiB" for kind, size in state.items())
        total = sum(state.values()) / _MIB
        lines.append(
            f"| {name} | {curve['held_out'][-1][1]:.3f} | {total:.2f} MiB | {parts} | "
            f"{curve['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def draw(axes: Axes, curves: Curves) -> None:
    """Draw the training batches' losses thin, and the held-out text's thick."""
    for color, (name, curve) in zip(itertools.cycle(_COLORS), curves.items(), strict=False):
        axes.plot(*zip(*curve["train"], strict=True), color=color, alpha=0.45, linewidth=1)
        held_out = zip(*curve["held_out"], strict=True)
        axes.plot(*held_out, color=color, marker="o", label=f"{name}, held-out")
    axes.set(xlabel="step", ylabel="masked-LM loss (nats)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plot(curves: Curves, picture: Path) -> None:
    """Write the picture."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    draw(axes, curves)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def main() -> int:
    """Compare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--run", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True)

    def program() -> None:
        args = parser.parse_args()
        curves = read(args.run)
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "optimizers.md").write_text(table(curves))
        plot(curves, args.out / "optimizers.png")
        print(table(curves))

    return exit_code_of(program)


if __name__ == "__main__":
    sys.exit(main())
