"""Compare ways to fine-tune without forgetting: IoU on what the model knew (A) and on what it learns (B).

    python bench/forgetting.py [--photos 8000] [--start-steps 1600] [--steps 600] [--folder FOLDER] [--keep 0.9]

The demo's model learns scenes of some colours (A), and then scenes of other colours (B): plainly, for a quarter of the
steps, with frozen parts, by adapters, with photos of A among those of B, as a running average of its weights
(train.ema), and as five blends with the start (launch/blend.py). The best without forgetting is the one with the
highest IoU(B) among those that keep --keep of the start's IoU(A). Scores are on scenes that the model has not seen.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from adapter import RANK, Prepared, adapter_settings, add_sizes, export, prepare, score, train

from cogvlm_ft.export.blend import Blend

FRACTIONS = (0.2, 0.4, 0.6, 0.8, 0.9)
FROZEN = 'model.freeze=["model.vision.*", "*.self_attn.*"]'
REPLAYED = (0.25, 0.5)  # fractions of the photos


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser)
    parser.add_argument("--keep", type=float, default=0.9, help="least fraction of the start's IoU(A) (default: 0.9)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        made = prepare(folder, args)
        found = {"start": scores(made, made.start)}
        print(f"{'':>22} IoU(A) IoU(B)\n{'start':>22} {found['start'][0]:6.3f} {found['start'][1]:6.3f}", flush=True)
        for name, model in models(folder, made, args.steps):
            found[name] = scores(made, model)
            print(f"{name:>22} {found[name][0]:6.3f} {found[name][1]:6.3f}", flush=True)
        known = found["start"][0]
        kept = {name: each for name, each in found.items() if each[0] >= args.keep * known}
        best = max(kept, key=lambda name: kept[name][1])
        on_a, on_b = found[best]
        print(f"best without forgetting: {best}, IoU(B) {on_b:.3f}, IoU(A) {on_a:.3f} of {known:.3f}")


def models(folder: Path, made: Prepared, num_steps: int) -> Iterator[tuple[str, Path]]:
    """Train each way, and yield (name, model folder)."""
    own = {made.new: 1.0}
    ways: dict[str, tuple[dict[Path, float], int, list[str]]] = {
        "plain": (own, num_steps, ["train.ema=0.98"]),
        "a quarter of the steps": (own, num_steps // 4, []),
        "frozen parts": (own, num_steps, [FROZEN]),
        "LoRA": (own, num_steps, adapter_settings(RANK)),
        **{f"replay {part:g}": ({made.new: 1 - part, made.old: part}, num_steps, []) for part in REPLAYED},
    }
    for name, (shown, steps, changes) in ways.items():
        run = train(folder / name, shown, made.start, steps, *changes)
        yield name, export(run.checkpoint, folder / f"{name} exported")
        if name == "plain":
            yield "EMA", export(run.checkpoint, folder / "EMA exported", averaged=True)
            for fraction in FRACTIONS:
                blend = Blend(fraction, made.start)
                yield f"blend {fraction:g}", export(run.checkpoint, folder / f"blend {fraction:g}", blend=blend)


def scores(made: Prepared, folder: Path) -> tuple[float, float]:
    """Return the mean IoU on the scenes of the start and on the new ones."""
    return score(folder, made.old), score(folder, made.new)


if __name__ == "__main__":
    main()
