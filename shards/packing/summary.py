"""Format the result of a build as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cogvlm_ft.shards.packing.problem_files import PROBLEM_FILES, ProblemFiles
from cogvlm_ft.shards.packing.splits import SPLITS


def summarize(index: dict[str, Any], files: ProblemFiles, out: Path) -> str:
    """Format kept samples by split, rejected parts and notes by reason with one example each, and the output files."""
    lines = [f"{'split':<8}{'shards':>8}{'samples':>10}{'targets':>10}{'boxes':>10}{'absent':>8}{'turns':>8}"]
    for name, split in index["splits"].items():
        counts = f"{split['num_samples']:>10}{split['num_targets']:>10}{split['num_boxes']:>10}"
        lines.append(f"{name:<8}{len(split['shards']):>8}{counts}{split['num_absent']:>8}{split['num_turns']:>8}")
    lines += _splitting(index["build"])
    lines += _empty_splits(index["splits"])
    if "negatives" in index:
        lines += _negatives(index["negatives"])
    lines += _by_reason("rejected", index["rejected"], files.rejected.examples)
    if index["notes"]:
        lines += _by_reason("notes (nothing was lost)", index["notes"], files.notes.examples)
    tars = " ".join(f"{name}-*.tar" for name in index["splits"])
    lines.append(f"\n{out}: {', '.join(('index.json', *PROBLEM_FILES))}, {tars}")
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _splitting(build: dict[str, Any]) -> list[str]:
    """Describe where the splits come from, and which photos were kept together."""
    found = build["splitting"]
    stated = ", ".join(f"{count} {name}" for name, count in found["stated"].items() if count and name != "none")
    lines = []
    if found["kept"] and build["split"] in SPLITS:
        lines.append(f"\nsplits: all photos are {build['split']}, by --split")
    elif found["kept"]:
        others = f"; the {found['stated']['none']} others are train" if found["stated"]["none"] else ""
        lines.append(f"\nsplits: as in the files ({stated}{others}). --split random splits by --val-fraction instead")
        if found["val_fraction"] is not None:
            lines.append(f"  no photo is stated to be val: {found['val_fraction']:g} of train becomes val")
    elif found["stated"]["val"] or found["stated"]["test"]:
        lines.append(f"\nsplits: at random; those in the files ({stated}) are not used. --split folders keeps them")
    if found["num_groups"]:
        photos, groups = (
            f"{found['num_grouped']} photos",
            f"{found['num_groups']} group{'' if found['num_groups'] == 1 else 's'}",
        )
        largest = f"the largest has {found['largest']}, such as {found['largest_name']}"
        lines.append(f"\nkept together: {photos} in {groups} of copies or series, never in two splits; {largest}")
    if found["num_identical"]:
        lines.append(f"  {found['num_identical']} photos have the content of another one")
    if found["num_moved"]:
        lines.append(f"  {found['num_moved']} photos are copies of photos of another split and were moved there")
    if found["num_unmatched"]:
        lines.append(f"  {found['num_unmatched']} photos do not match --group-by; they are grouped by photo")
    return lines


def _empty_splits(splits: dict[str, Any]) -> list[str]:
    """Say which split has no sample; a training run needs both."""
    num_train, num_val = (splits[name]["num_samples"] for name in ("train", "val"))
    if not num_val:
        needed = f"; 1 of {num_train} photos needs --val-fraction {1 / num_train:.2g}" if num_train > 1 else ""
        return [
            f"\nval is empty: a training run needs val photos. Build with a larger --val-fraction{needed},"
            " or set data.val_shards of the run to other shards"
        ]
    if not num_train:
        return ["\ntrain is empty: these shards serve validation only (data.val_shards)"]
    return []


def _negatives(found: dict[str, Any]) -> list[str]:
    """Describe the reached fraction of absent targets, and why it is lower than requested."""
    added = ", ".join(f"{count} by {kind}" for kind, count in found["added"].items())
    reached, requested = found["share_reached"], found["share_requested"]
    lines = [f"\nabsent targets: {reached:.1%} of all, requested {requested:.1%}; {added}"]
    if found["background_photos"]:
        used = f"{found['background_used']} of {found['background_photos']} photos without annotations"
        lines.append(f"  {used} are used. Leave out photos that nobody has annotated yet.")
    return lines + [f"  {reason}" for reason in found["why_fewer"]]


def _by_reason(title: str, counts: dict[str, int], examples: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"\n{title}: {sum(counts.values()) or 'nothing'}"]
    for reason, count in counts.items():
        row = examples[reason]
        place = " ".join(part for part in (row["image"], row["source"]) if part)
        lines.append(f"  {count:>7} {reason:<28} e.g. {place}: {row['detail']}"[:200])
    return lines
