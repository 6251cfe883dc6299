"""A plan in a few lines, as a recipe prints it before it starts.

Imports no rich, which takes longer than the rest of this folder.
"""

from megatron_adams.planning.gpus import GIB
from megatron_adams.planning.results import Mode, Plan


def gib(num_bytes: float) -> str:
    """GiB with two decimals, or as many as two digits need."""
    value = num_bytes / GIB
    return f"{value:.2f}" if value >= 0.1 or not value else f"{value:.2g}"


def short(plan: Plan) -> str:
    """A few lines: the job, and its fullest rank with AdamW and with AdamS."""
    lines = [_job(plan)]
    given = plan.data["given"]
    shown = [mode for mode in plan.modes if mode in shown_modes(plan) or mode.name == given]
    for mode in shown:
        kind = plan.fullest(mode.name)
        lines.append(
            f"  {mode.title:<29} {gib(kind.optimizer_bytes(mode.name)):>7} GiB of state, "
            f"{gib(kind.static_bytes(mode.name)):>7} GiB with weights and gradients"
            f"{'  <- this job' if mode.name == given else ''}"
        )
    lines.append(f"  Activations come on top: {gib(plan.activations)} GiB by Megatron's estimate.")
    return "\n".join([*lines, *(f"  {note}" for note in plan.data["notes"])])


def _job(plan: Plan) -> str:
    layout = plan.data["layout"]
    sizes = [f"{name.upper()}{size}" for name, size in layout.items() if size > 1]
    num_params = plan.data["model"]["num_params"]
    return (
        f"Memory plan: {num_params / 1e9:.3g} billion params on {plan.data['num_ranks']:,} ranks "
        f"({' x '.join(sizes) or 'one GPU'}), the fullest one"
    )


def shown_modes(plan: Plan) -> list[Mode]:
    """AdamW, AdamS and its 4 bytes, or what there is of them."""
    names = ("adamw", "adams", "adams_precision_aware_bf16")
    return [mode for mode in plan.modes if mode.name in names]
