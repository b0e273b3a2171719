"""Run cogvlm-wandb-sync, the new name of cogvlm-replay; the next version removes this name."""

from __future__ import annotations

import sys

try:
    from cogvlm_ft.launch.wandb_sync import main as wandb_sync
    from cogvlm_ft.terminal import say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    say("cogvlm-replay is now cogvlm-wandb-sync (launch/wandb_sync.py); this name will be removed", file=sys.stderr)
    return wandb_sync(argv)


if __name__ == "__main__":
    sys.exit(main())
