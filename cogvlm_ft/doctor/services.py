"""Check Weights & Biases: the mode of the run, and whether the server answers and accepts the key."""

from __future__ import annotations

import os
from typing import NamedTuple

import requests

from cogvlm_ft.doctor.examination import Examination, Finding, Reading, green, red, yellow
from cogvlm_ft.tracking.provenance import without_passwords
from cogvlm_ft.tracking.wandb_run import stated_mode

TIMEOUT_S = 5
SENT_LATER = "launch/wandb_sync.py uploads it later"


class Server(NamedTuple):
    """Facts of the server. mode: of wandb_run.WandbRun; account: owner of the key, None if it is not accepted.

    address: without a password; empty if no request was sent.
    """

    mode: str
    has_key: bool
    address: str = ""
    account: str | None = None
    problem: str = ""


def read_wandb(examination: Examination) -> Server:
    """Send at most one request; the key goes nowhere else."""
    configured = examination.config.tracking.mode
    mode = stated_mode(configured)
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
        # Without its text, which may contain the address and password of a proxy.
        return Server(mode, True, shown, problem=f"{type(error).__name__} within {TIMEOUT_S} s")
    return Server(mode, True, shown, account)


def _account(address: str, key: str | None) -> str | None:
    """Return the owner of the key, "unknown" for identity tokens, None if the server does not accept the key."""
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


def judge_wandb(examination: Examination, readings: list[Reading]) -> list[Finding]:
    """Report problems as red only with tracking.mode=online: otherwise the run is recorded offline."""
    found: Server = readings[0].facts
    if found.mode == "disabled":
        return [green("disabled: metrics.jsonl and report.html have all results")]
    if found.mode == "offline":
        return [green(f"offline: {SENT_LATER}")]
    if not found.has_key and found.mode == "auto":
        return [green(f"offline, since there is no API key: {SENT_LATER}")]
    if found.account:
        return [green(f"online: {found.address} answers and accepts the key ({found.account})")]
    if not found.has_key:
        problem = "no API key"
    else:
        problem = f"{found.address}: {found.problem or 'the server does not accept this key'}"
    to_do = f"run wandb login, set WANDB_BASE_URL for your own server, or tracking.mode=offline: {SENT_LATER}"
    if examination.config.tracking.mode == "online":
        return [red(problem, "a server that answers, since tracking.mode=online", to_do)]
    return [yellow(f"{problem}: the run will be recorded offline", to_do)]
