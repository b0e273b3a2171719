"""Format the result of a build as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def summarize(index: dict[str, Any], examples: dict[str, dict[str, Any]], out: Path) -> str:
    """Format kept samples by split, rejected parts by reason with one example each, and the output files."""
    lines = [f"{'split':<8}{'shards':>8}{'samples':>10}{'targets':>10}{'boxes':>10}{'absent':>8}{'turns':>8}"]
    for name, split in index["splits"].items():
        counts = f"{split['num_samples']:>10}{split['num_targets']:>10}{split['num_boxes']:>10}"
        lines.append(f"{name:<8}{len(split['shards']):>8}{counts}{split['num_absent']:>8}{split['num_turns']:>8}")
    if "negatives" in index:
        found = index["negatives"]
        added = ", ".join(f"{count} by {kind}" for kind, count in found["added"].items())
        lines.append(
            f"\nabsent targets: {found['share_reached']:.1%} of all, requested {found['share_wanted']:.1%}; {added}"
        )
    lines.append(f"\nrejected: {sum(index['rejected'].values()) or 'nothing'}")
    for reason, count in index["rejected"].items():
        row = examples[reason]
        place = " ".join(part for part in (row["image"], row["source"]) if part)
        lines.append(f"  {count:>7} {reason:<28} e.g. {place}: {row['detail']}"[:200])
    lines.append(f"\n{out}: index.json, rejected.jsonl, {' '.join(f'{name}-*.tar' for name in index['splits'])}")
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()
