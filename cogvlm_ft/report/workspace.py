"""The W&B workspace of grounding runs: sections and their panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.tracking.wandb_run import EPOCH, PICTURES, STEP, TABLE, train_key, val_key

NAME = "CogVLM grounding"
OPEN = ("Validation", "Training", "Pictures", "Predictions")  # the other sections are folded
HEADLINE = (
    *("mean_iou", "acc@0.5", "acc@0.75", "f1@0.5", "count_acc", "centre_acc"),
    *("not_found_acc", "false_not_found", "unreadable"),
)
SPLITS = {  # the group of a metric such as acc@0.5/size=small -> what the section is called
    "size": "By target size (COCO)",
    "share": "By fraction of the image side",
    "patches": "By vision patches",
    "language": "By language",
    "targets": "By number of targets",
    "source": "By source",
    "template": "By wording",
}
SIZES = ("size", "share", "patches")  # which absent targets do not have
TRAINING = ("loss", "lr", "grad_norm", "num_bad", "num_skipped", "loss_spike")
SPEED = (
    "images_per_s",
    "tokens_per_s",
    "step_s",
    "data_wait_fraction",
    "slowest_rank_ratio",
    "tflops",
    "mfu",
    "memory_gib",
)
GPUS = range(8)  # of the first node, the only one that W&B monitors
SYSTEM = {
    "GPU use, %": [f"system/gpu.{gpu}.gpu" for gpu in GPUS],
    "GPU memory, %": [f"system/gpu.{gpu}.memoryAllocated" for gpu in GPUS],
    "GPU power, W": [f"system/gpu.{gpu}.powerWatts" for gpu in GPUS],
    "CPU, %": ["system/cpu"],
    "Memory, %": ["system/memory_percent"],
    "Network, bytes": ["system/network.sent", "system/network.recv"],
}


def build_workspace(entity: str | None, project: str) -> Any:
    """Build a `wandb_workspaces` Workspace without saving it. Raises ConfigError if that package is missing.

    entity: None = the owner of the key, which W&B is asked for.
    """
    ws, wr = _import()
    if entity is None:
        import wandb

        entity = wandb.Api().default_entity
    sections = [
        ("Validation", [_val_plot(wr, name) for name in HEADLINE]),
        ("Training", [_plot(wr, STEP, train_key(name)) for name in TRAINING]),
        ("Pictures", [_pictures(wr, group) for group in ("same", "worst", "newly_lost")]),
        ("Predictions", [wr.WeavePanelSummaryTable(table_name=TABLE)]),
        *((title, [_split_plot(wr, name, group) for name in _split_metrics(group)]) for group, title in SPLITS.items()),
        ("Speed", [_plot(wr, STEP, train_key(name)) for name in SPEED]),
        ("System", [wr.LinePlot(title=title, x="_runtime", y=keys) for title, keys in SYSTEM.items()]),
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[_section(ws, wr, title, panels, is_open=title in OPEN) for title, panels in sections],
        settings=ws.WorkspaceSettings(group_by_prefix="first", max_runs=10),
    )


def save_workspace(entity: str | None, project: str) -> str:
    """Save the workspace at W&B, and return its address. Raises ConfigError with W&B's message."""
    _import()
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise ConfigError("no key for W&B: run `wandb login` or set WANDB_API_KEY; --print needs none")
    try:
        workspace = build_workspace(entity, project)
        return str(workspace.save().url)
    except Exception as error:
        raise ConfigError(
            f"W&B refused the workspace of entity={entity}, project={project} ({type(error).__name__}: {error}); "
            "expected a project with at least one run, and a key with write access"
        ) from error


def describe_workspace(project: str) -> dict[str, Any]:
    """Return the layout as W&B stores it, without a network."""
    view: dict[str, Any] = build_workspace("entity", project)._to_model().model_dump(by_alias=True, exclude_none=True)
    return view


def _import() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ConfigError(f'the layout needs another package: pip install -e ".[workspace]" ({error})') from None
    return ws, wr


def _section(ws: Any, wr: Any, title: str, panels: Sequence[Any], *, is_open: bool) -> Any:
    """Arrange panels three in a row; images and tables over the whole width."""
    y = x = 0
    for panel in panels:
        width, height = (8, 6) if isinstance(panel, wr.LinePlot) else (24, 12)
        if x + width > 24:
            x, y = 0, y + height
        panel.layout = wr.Layout(x=x, y=y, w=width, h=height)
        x += width
    return ws.Section(name=title, panels=list(panels), is_open=is_open)


def _plot(wr: Any, axis: str, key: str) -> Any:
    return wr.LinePlot(title=key.partition("/")[2], x=axis, y=[key])


def _val_plot(wr: Any, name: str) -> Any:
    return wr.LinePlot(title=name, x=EPOCH, y=[val_key(name)])


def _split_plot(wr: Any, metric: str, group: str) -> Any:
    """Draw one metric for every value of a group."""
    prefix = val_key(f"{metric}/{group}=")
    return wr.LinePlot(title=f"{metric} by {group}", x=EPOCH, metric_regex=f"^{prefix}.+$")


def _split_metrics(group: str) -> tuple[str, ...]:
    return ("mean_iou", "acc@0.5", "centre_acc" if group in SIZES else "not_found_acc")


def _pictures(wr: Any, group: str) -> Any:
    title = {"same": "The same images every time", "worst": "The worst", "newly_lost": "Right before, wrong now"}[group]
    return wr.MediaBrowser(title=title, media_keys=[f"{PICTURES}/{group}"], num_columns=4)
