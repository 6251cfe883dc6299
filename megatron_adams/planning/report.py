"""A plan as tables on a terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_adams.planning.gpus import Gpu
from megatron_adams.planning.lines import gib, shown_modes
from megatron_adams.planning.results import STEP_EFFICIENCY, Kind, Mode, Plan

_WORDS_OF_KINDS = {
    "main_params": "main\nparams",
    "remainders": "remain-\nders",
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "scales": "scales",
}


def print_report(plan: Plan, gpu: Gpu | None, console: Console) -> None:
    """Print the tables of a plan."""
    layout, model = plan.data["layout"], plan.data["model"]
    sizes = ", ".join(f"{name.upper()} {size}" for name, size in layout.items())
    console.print(f"{model['num_params']:,} params on {plan.data['num_ranks']:,} ranks: {sizes}")
    console.print(_modes_table(plan, gpu))
    console.print(_kinds_table(plan))
    console.print(_stages_table(plan))
    if plan.data["by_dp_size"]:
        console.print(_dp_table(plan))
    for line in _footnotes(plan, gpu):
        console.print(line)


def _table(title: str) -> Table:
    # As narrow as it goes: 80 columns hold the widest.
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        show_edge=False,
    )


def _modes_table(plan: Plan, gpu: Gpu | None) -> Table:
    table = _table("The fullest rank, GiB")
    table.add_column("Optimizer", no_wrap=True)
    headings = ["Bytes/\nparam", "State", "Saved", "Static", "Total"]
    if gpu:
        headings.append(f"Fits\n{gpu.memory_gib:.0f} GiB")
        if gpu.bandwidth_gb_s:
            headings.append("Step\nms")
    for heading in headings:
        table.add_column(heading, justify="right")
    baseline = plan.fullest("adamw").optimizer_bytes("adamw")
    for mode in plan.modes:
        kind = plan.fullest(mode.name)
        saved = baseline - kind.optimizer_bytes(mode.name)
        total = plan.total_bytes(mode.name)
        cells = [
            str(mode.bytes_per_param),
            gib(kind.optimizer_bytes(mode.name)),
            gib(saved) if saved > 0 else "",
            gib(kind.static_bytes(mode.name)),
            gib(total),
        ]
        if gpu:
            cells.append(gpu.fits(total))
            if gpu.bandwidth_gb_s:
                step_s = plan.step_s(mode, gpu.bandwidth_gb_s)
                cells.append("?" if step_s is None else f"{1e3 * step_s:.2f}")
        table.add_row(_title(plan, mode), *cells)
    return table


def _title(plan: Plan, mode: Mode) -> Text:
    is_given = mode.name == plan.data["given"]
    return Text(mode.title + (" *" if is_given else ""), style="bold" if is_given else "")


def _kinds_table(plan: Plan) -> Table:
    """The state of the fullest rank by kind."""
    table = _table("Its state by kind, GiB")
    table.add_column("Optimizer", no_wrap=True)
    states = {mode.name: plan.fullest(mode.name).optimizer[mode.name] for mode in plan.modes}
    kinds = [kind for kind in _WORDS_OF_KINDS if any(kind in state for state in states.values())]
    for kind in kinds:
        table.add_column(_WORDS_OF_KINDS[kind], justify="right")
    for mode in plan.modes:
        state = states[mode.name]
        cells = [gib(state[kind]) if kind in state else "" for kind in kinds]
        table.add_row(_title(plan, mode), *cells)
    return table


def _stages_table(plan: Plan) -> Table:
    """The ranks with the most of each stage."""
    table = _table("Each pipeline stage's fullest rank, GiB")
    modes = shown_modes(plan)
    table.add_column("Stages", no_wrap=True)
    for heading in ("Ranks", "Weights", "Grads"):
        table.add_column(heading, justify="right")
    for mode in modes:
        table.add_column(f"{_brief(mode)}\nstate", justify="right")
    for stages, num_ranks, kind in _fullest_of_stages(plan):
        table.add_row(
            stages,
            f"{num_ranks:,}",
            gib(kind.weights),
            gib(kind.gradients[modes[0].name]),
            *(gib(kind.optimizer_bytes(mode.name)) for mode in modes),
        )
    return table


def _brief(mode: Mode) -> str:
    return mode.title.replace(", precision-aware", "")


def _fullest_of_stages(plan: Plan) -> list[tuple[str, int, Kind]]:
    """Like stages in one row: their names, their ranks, and the fullest of them."""
    fullest: dict[int, Kind] = {}
    num_ranks: dict[int, int] = {}
    for kind in plan.kinds:
        stage = kind.pipeline_stage
        num_ranks[stage] = num_ranks.get(stage, 0) + kind.num_ranks
        if stage not in fullest or kind.static_bytes("adamw") > fullest[stage].static_bytes(
            "adamw"
        ):
            fullest[stage] = kind
    groups: dict[tuple[int, int, int], list[int]] = {}
    for stage, kind in fullest.items():
        key = (kind.weights, kind.gradients["adamw"], kind.optimizer_bytes("adamw"))
        groups.setdefault(key, []).append(stage)
    last = max(fullest)
    return [
        (_stages(stages, last), sum(num_ranks[stage] for stage in stages), fullest[stages[0]])
        for stages in groups.values()
    ]


def _stages(stages: Sequence[int], last: int) -> str:
    if last == 0:
        return "the only one"
    runs: list[list[int]] = []
    for stage in stages:
        if runs and runs[-1][1] == stage - 1:
            runs[-1][1] = stage
        else:
            runs.append([stage, stage])
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    ends = {0: " (first)", last: " (last)"}
    return ", ".join(words) + (ends.get(stages[0], "") if len(stages) == 1 else "")


def _dp_table(plan: Plan) -> Table:
    table = _table("State by data-parallel size, GiB")
    modes = shown_modes(plan)
    table.add_column("DP", justify="right")
    for mode in modes:
        table.add_column(_brief(mode), justify="right")
    table.add_column("AdamS saves", justify="right")
    own = plan.data["layout"]["dp"]
    for row in plan.data["by_dp_size"]:
        state = row["optimizer"]
        table.add_row(
            f"{row['dp_size']}{' *' if row['dp_size'] == own else ''}",
            *(gib(state[mode.name]) for mode in modes),
            gib(state["adamw"] - state["adams"]),
        )
    return table


def _footnotes(plan: Plan, gpu: Gpu | None) -> list[str]:
    lines = [
        "* as the flags ask for. Static: state, weights and gradients, counted in Megatron's own "
        "buffers and optimizers. Total: with activations, Megatron's estimate of the first stage: "
        f"{gib(plan.activations)} GiB.",
    ]
    if gpu:
        lines.append(
            "Fits: tight means the last tenth of the memory. CUDA's context, NCCL, workspaces and "
            "fragmentation are not in the total."
        )
        if gpu.bandwidth_gb_s:
            lines.append(
                f"Step: the bytes that the optimizer moves, at {STEP_EFFICIENCY:.0%} of "
                f"{gpu.bandwidth_gb_s:,.0f} GB/s, which AdamS reached on an H100; without "
                "collectives. ? is not known."
            )
    return [*lines, *plan.data["notes"]]
