"""A plan in words: tables on a terminal, and the few lines that a recipe prints."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_adams.planning.gpus import Gpu
from megatron_adams.planning.results import GIB, STEP_EFFICIENCY, Kind, Mode, Plan

_WORDS_OF_KINDS = {
    "main_params": "main params",
    "remainders": "remainders",
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "scales": "scales",
}


def gib(num_bytes: float) -> str:
    """GiB with three significant digits or two decimals, whichever is more."""
    value = num_bytes / GIB
    if 0 < value < 0.01:
        return f"{num_bytes / 2**20:.2f} MiB"
    return f"{value:.2f}"


def short(plan: Plan) -> str:
    """A few lines: the job, and its fullest rank with AdamW and with AdamS."""
    lines = [_job(plan)]
    for name in ("adamw", "adams", "adams_precision_aware_bf16", "as_given"):
        found = [mode for mode in plan.modes if mode.name == name]
        for mode in found:
            kind = plan.fullest(mode.name)
            mark = "  <- this job" if mode.name == plan.data["given"] else ""
            lines.append(
                f"  {mode.title:<29} {gib(kind.optimizer_bytes(mode.name)):>8} GiB of state, "
                f"{gib(kind.static_bytes(mode.name)):>8} GiB with weights and gradients{mark}"
            )
    given = plan.data["given"]
    if given not in ("adamw", "adams", "adams_precision_aware_bf16", "as_given"):
        mode = plan.mode(given)
        kind = plan.fullest(given)
        lines.append(
            f"  {mode.title:<29} {gib(kind.optimizer_bytes(given)):>8} GiB of state, "
            f"{gib(kind.static_bytes(given)):>8} GiB with weights and gradients  <- this job"
        )
    lines.append(f"  Activations come on top: {gib(plan.activations)} GiB by Megatron's estimate.")
    return "\n".join([*lines, *(f"  {note}" for note in plan.data["notes"])])


def _job(plan: Plan) -> str:
    layout = plan.data["layout"]
    sizes = [f"{name.upper()}{layout[name]}" for name in ("tp", "pp", "vpp", "cp", "ep", "dp")]
    shown = [size for size in sizes if not size.endswith("1") or size[-2:-1].isdigit()]
    num_params = plan.data["model"]["num_params"]
    return (
        f"Memory plan: {num_params / 1e9:.3g} billion params on {plan.data['num_ranks']:,} ranks "
        f"({' x '.join(shown) or 'one GPU'}), each rank's fullest"
    )


def print_report(plan: Plan, gpu: Gpu | None, console: Console) -> None:
    """Print the tables of a plan."""
    layout, model = plan.data["layout"], plan.data["model"]
    sizes = ", ".join(f"{name.upper()} {size}" for name, size in layout.items())
    console.print(
        f"{model['num_params']:,} params, {model['num_layers']} layers, hidden size "
        f"{model['hidden_size']}; {plan.data['num_ranks']:,} ranks: {sizes}",
        highlight=False,
    )
    console.print(_modes_table(plan, gpu))
    console.print(_ranks_table(plan))
    if plan.data["by_dp_size"]:
        console.print(_dp_table(plan))
    for line in _footnotes(plan, gpu):
        console.print(line, highlight=False)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="bold")


def _modes_table(plan: Plan, gpu: Gpu | None) -> Table:
    table = _table("The fullest rank, GiB")
    table.add_column("Optimizer", no_wrap=True)
    for heading in ("Bytes a param", "State", "Weights", "Grads", "Sum", "Activations", "Total"):
        table.add_column(heading, justify="right")
    table.add_column("Saved", justify="right")
    if gpu:
        table.add_column(f"Fits {gpu.memory_gib:.0f} GiB", justify="right")
        if gpu.bandwidth_gb_s:
            table.add_column("Step, ms", justify="right")
    baseline = plan.fullest("adamw").optimizer_bytes("adamw")
    for mode in plan.modes:
        kind = plan.fullest(mode.name)
        saved = baseline - kind.optimizer_bytes(mode.name)
        total = plan.total_bytes(mode.name)
        cells = [
            str(mode.bytes_per_param),
            gib(kind.optimizer_bytes(mode.name)),
            gib(kind.weights),
            gib(kind.gradients[mode.name]),
            gib(kind.static_bytes(mode.name)),
            gib(plan.activations),
            gib(total),
            gib(saved) if saved > 0 else "",
        ]
        if gpu:
            cells.append(gpu.fits(total))
            if gpu.bandwidth_gb_s:
                step_s = plan.step_s(mode, gpu.bandwidth_gb_s)
                cells.append("?" if step_s is None else f"{1e3 * step_s:.2f}")
        is_given = mode.name == plan.data["given"]
        title = Text(mode.title + (" *" if is_given else ""), style="bold" if is_given else "")
        table.add_row(title, *cells)
    return table


def _ranks_table(plan: Plan) -> Table:
    """State by kind of the stages' ranks, those with the most of each stage."""
    table = _table("Each pipeline stage's fullest rank, GiB")
    modes = _shown_modes(plan)
    table.add_column("Stages", no_wrap=True)
    for heading in ("Ranks", "Weights", "Grads"):
        table.add_column(heading, justify="right")
    for mode in modes:
        for name in plan.kinds[0].optimizer[mode.name]:
            if name != "scales":
                words = f"{mode.title.replace(', precision-aware', '')}\n{_WORDS_OF_KINDS[name]}"
                table.add_column(words, justify="right")
    for stages, num_ranks, kind in _fullest_of_stages(plan):
        cells = [
            gib(kind.optimizer[mode.name][name])
            for mode in modes
            for name in plan.kinds[0].optimizer[mode.name]
            if name != "scales"
        ]
        grads = gib(kind.gradients[modes[0].name])
        table.add_row(stages, f"{num_ranks:,}", gib(kind.weights), grads, *cells)
    return table


def _shown_modes(plan: Plan) -> list[Mode]:
    """AdamW, AdamS and its 4 bytes, or what there is of them."""
    names = ("adamw", "adams", "adams_precision_aware_bf16")
    return [mode for mode in plan.modes if mode.name in names]


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
    table = _table("Optimizer state of a rank by data-parallel size, GiB")
    modes = _shown_modes(plan)
    table.add_column("DP", justify="right")
    for mode in modes:
        table.add_column(mode.title, justify="right")
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
    lines = ["* as the flags ask for."]
    lines.append(
        "State, weights and gradients are counted in Megatron's own buffers and optimizers. "
        "Activations are Megatron's estimate of the first stage "
        f"({plan.data['activations']['formula']})."
    )
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
