"""Check of Weights & Biases: which mode a training will take, and whether its server answers and knows the key."""

from __future__ import annotations

import os
from typing import NamedTuple

import requests

from cogvlm_ft.doctor.examination import Check, Examination, Finding, Seen, green, red, yellow
from cogvlm_ft.tracking.provenance import without_passwords

TIMEOUT_S = 5
SENT_LATER = "launch/wandb_sync.py sends it later"


class Server(NamedTuple):
    """mode: as wandb_run.WandbRun takes it. account: whose the key is; None: the server does not know it.

    address: of the server, without a password; empty if it is not asked.
    """

    mode: str
    has_key: bool
    address: str = ""
    account: str | None = None
    problem: str = ""


def look_at_wandb(examination: Examination) -> Server:
    """At most one request, and the key goes nowhere but there."""
    wanted = examination.config.tracking.mode
    mode = os.environ.get("WANDB_MODE", "auto") if wanted == "auto" else wanted
    if mode in ("disabled", "offline"):
        return Server(mode, has_key=False)
    import wandb  # slow to import

    address = (os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url)).rstrip("/")
    key = os.environ.get("WANDB_API_KEY") or wandb.setup().settings.api_key
    key = key or (requests.utils.get_netrc_auth(address) or ("", ""))[1]
    if not key and "WANDB_IDENTITY_TOKEN_FILE" not in os.environ:
        return Server(mode, has_key=False)
    shown = without_passwords(address)
    try:
        account = _account(address, key)
    except (requests.RequestException, ValueError) as error:
        # Not its text, which may hold the address of a proxy with its password.
        return Server(mode, True, shown, problem=f"{type(error).__name__} within {TIMEOUT_S} s")
    return Server(mode, True, shown, account)


def _account(address: str, key: str | None) -> str | None:
    """Whose key it is, "unknown" without one (identity tokens), None where the server does not know it."""
    with requests.post(
        f"{address}/graphql",
        json={"query": "query { viewer { username } }"},
        auth=("api", key) if key else None,
        timeout=TIMEOUT_S,
        allow_redirects=False,
    ) as answer:
        if not key:
            return "unknown"
        if answer.status_code in (401, 403):
            return None
        answer.raise_for_status()
        viewer = (answer.json().get("data") or {}).get("viewer") or {}
    return viewer.get("username")


def judge_wandb(examination: Examination, seen: list[Seen]) -> list[Finding]:
    """Trouble is red only where the settings insist on a server: otherwise a training records offline."""
    found: Server = seen[0].facts
    if found.mode == "disabled":
        return [green("disabled: metrics.jsonl and report.html have everything")]
    if found.mode == "offline":
        return [green(f"offline: {SENT_LATER}")]
    if not found.has_key and found.mode == "auto":
        return [green(f"offline, since there is no key: {SENT_LATER}")]
    if found.account:
        return [green(f"online: {found.address} answers and knows the key ({found.account})")]
    if not found.has_key:
        trouble = "there is no key"
    else:
        trouble = f"{found.address}: {found.problem or 'the server does not know this key'}"
    to_do = f"wandb login, WANDB_BASE_URL for a server of your own, or tracking.mode=offline: {SENT_LATER}"
    if examination.config.tracking.mode == "online":
        return [red(trouble, "a server that answers, as tracking.mode=online", to_do)]
    return [yellow(f"{trouble}: the run will be recorded offline", to_do)]


WANDB = Check("W&B", look_at_wandb, judge_wandb)
