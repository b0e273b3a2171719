"""Run cogvlm-wandb-sync, the new name of cogvlm-replay; this name is removed in the next version."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    print("cogvlm-replay is now cogvlm-wandb-sync (launch/wandb_sync.py); this name will be removed", file=sys.stderr)
    from cogvlm_ft.launch.wandb_sync import main as wandb_sync

    return wandb_sync(argv)


if __name__ == "__main__":
    sys.exit(main())
