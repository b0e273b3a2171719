"""Indexes of the splits of a run, which one rank of each node reads for all ranks there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cogvlm_ft.data.index import ShardIndex
from cogvlm_ft.data.patience import set_retry_s
from cogvlm_ft.data.reader import known_indexes, read_index, source_of_split
from cogvlm_ft.data.versions import Noted, adopt, noted
from cogvlm_ft.runtime.distributed import shared_errors
from cogvlm_ft.runtime.nodes import computed_once_per_node
from cogvlm_ft.settings import Config


@contextmanager
def indexed_once_per_node(config: Config, splits: Sequence[str]) -> Iterator[None]:
    """Let `open_split` find these splits indexed until the block ends: no tar is scanned twice on a node. Collective.

    A rank that sees other files under the same names, as in a container of its own, reads them itself.
    """
    splits = list(dict.fromkeys(splits))
    sources = [source_of_split(config, split) for split in splits]
    set_retry_s(config.data.retry_s)
    found = computed_once_per_node(lambda: [_indexed(config, split) for split in splits], sources)
    with shared_errors():
        for split, source, (index, files) in zip(splits, sources, found, strict=True):
            known_indexes[source] = index if adopt(files) else read_index(config, split)
    try:
        yield
    finally:
        for source in sources:
            known_indexes.pop(source, None)


def _indexed(config: Config, split: str) -> tuple[ShardIndex, Noted]:
    index = read_index(config, split)
    return index, noted(index.shard_paths)
