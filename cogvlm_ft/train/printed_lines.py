"""The lines that a training run prints: of its steps and of its evaluations. The rest is in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cogvlm_ft.evaluate.evaluate import METRICS_FILE
from cogvlm_ft.grounding.metrics import AVERAGED
from cogvlm_ft.plain_files import read_json
from cogvlm_ft.run_folder import RunFolder, step_folders, step_name

SHOWN_METRICS = ("mean_iou", "acc@0.5", "not_found_acc", "unreadable", "f1@0.5")
NUM_SHOWN, NUM_COLUMNS = 5, 100
BAR_WITH_END = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed} + {remaining}, ends {eta:%d %b %H:%M}, {rate_fmt}"


def step_line(step: int, last_step: int, values: Mapping[str, float]) -> str:
    """Return the line of one step, within 100 columns unless samples were lost.

    left: of the steps, without evaluations.
    """
    lost = (("num_bad", "bad"), ("num_cut_boxes", "boxes cut"), ("num_skipped", "skipped"))
    parts = [
        f"step {step}/{last_step}",
        f"loss {values['loss']:.4f}",
        f"lr {values['lr']:.1e}",
        f"grad {values['grad_norm']:.3g}",
        f"{values['images_per_s']:.3g} images/s",
        f"wait {values['data_wait_fraction']:.0%}",
        f"{values['memory_gib']:.1f} GiB",
        f"left {_duration((last_step - step) * values['step_s'])}",
        *(f"{name} {values[key]:.0f}" for key, name in lost if values[key]),
    ]
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    """Return about how long that is: `44.4 h`, `7 min`, `40 s`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def evaluation_line(
    epoch: float, step: int, metrics: Mapping[str, float], before: Mapping[str, float], monitored: str
) -> str:
    """Return the lines of one evaluation: five numbers, the monitored one first, and their change.

    Of averaged weights it has the monitored one alone.
    """
    first = (monitored, AVERAGED + monitored)
    names = [name for name in dict.fromkeys((*first, *SHOWN_METRICS)) if name in metrics][:NUM_SHOWN]
    parts = [f"epoch {epoch:.3g} (step {step})"]
    for name in names:
        change = f" ({metrics[name] - before[name]:+.2f})" if name in before else ""
        parts.append(f"{name} {metrics[name]:.3f}{change}")
    return _wrapped(parts)


def _wrapped(parts: Sequence[str]) -> str:
    """Join parts, two blanks apart, in lines of NUM_COLUMNS."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) + 2 <= NUM_COLUMNS:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"    {part}")
    return "\n".join(lines)


def metrics_before(folder: RunFolder, step: int) -> dict[str, float]:
    """Read the numbers of the last evaluation before a step; nothing if there is none that can be read."""
    try:
        earlier = [path for path in step_folders(folder.evaluations) if path.name < step_name(step)]
        found = read_json(max(earlier) / METRICS_FILE)
    except (OSError, ValueError):  # also of max(), if there is none
        return {}
    return {name: value for name, value in found.items() if isinstance(value, float)}
