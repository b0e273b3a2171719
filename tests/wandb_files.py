"""Reads what an offline W&B run wrote."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any


def read_wandb_records(run_dir: Path) -> list[Any]:
    """Records of a finished run's .wandb file, whose end wandb's own process may write after `finish` returned."""
    (path,) = run_dir.glob("*.wandb")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        records = parse_wandb_records(path.read_bytes())
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.05)
    raise AssertionError(f"{path}: wandb has not written its last record")


def parse_wandb_records(content: bytes) -> list[Any]:
    """Whole records of a .wandb file: 32 KiB blocks of chunks (crc u32, length u16, type u8: 1 whole, 2-4 parts)."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, pending, position = [], b"", 7
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        pending += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4) and position <= len(content):
            records.append(Record.FromString(pending))
            pending = b""
    return records


def records_of(kind: str, records: list[Any]) -> list[Any]:
    """The contents of the records of one kind: run, metric, summary, artifact, ..."""
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    """Logged rows without wandb's own columns."""
    rows = []
    for history in records_of("history", records):
        pairs = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
        rows.append({key: value for key, value in pairs.items() if not key.startswith("_")})
    return rows


def config_of(records: list[Any]) -> dict[str, Any]:
    (run,) = records_of("run", records)
    return {item.key: json.loads(item.value_json) for item in run.config.update}


def summary_of(records: list[Any]) -> dict[str, Any]:
    """The last value of every key of the summary."""
    items = [item for summary in records_of("summary", records) for item in summary.update]
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
