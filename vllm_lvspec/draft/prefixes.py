"""By what pages of the drafter's cache are found again, where a prompt begins as an earlier one did."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vllm_lvspec.draft.request import VisualItem

_DIGEST = 16  # bytes


@dataclass(frozen=True)
class SeenItem:
    """What is seen of an image or a video: entry `entries[i]` of the drafter's cache is its embedding `indices[i]`."""

    item: VisualItem
    entries: np.ndarray
    indices: np.ndarray


def page_keys(
    token_ids: np.ndarray, positions: np.ndarray, items: Iterable[SeenItem], page_size: int, salt: str | None = None
) -> list[bytes]:
    """A key for each full page of a prompt's entries, which stands for these entries and all before them.

    `token_ids [num_entries]`, `positions [dims, num_entries]`: of the prompt's tokens that are seen; visual tokens are
    also told apart by their item's identifier. Requests with different `salt` share nothing, as in vLLM's own cache.
    """
    num_entries, dims = len(token_ids), len(positions)
    columns = np.zeros((num_entries, dims + 4), dtype=np.int64)
    columns[:, 0], columns[:, 1 : 1 + dims] = token_ids, positions.T
    for seen in items:
        name = f"{'video' if seen.item.is_video else 'image'} {len(seen.item.rows)} {seen.item.identifier}"
        columns[seen.entries, -3:-1] = np.frombuffer(_digest(name.encode()), dtype=np.int64)
        columns[seen.entries, -1] = seen.indices
    keys, before = [], b"" if salt is None else _digest(salt.encode())
    for end in range(page_size, num_entries + 1, page_size):
        before = _digest(before + columns[end - page_size : end].tobytes())
        keys.append(before)
    return keys


def _digest(values: bytes) -> bytes:
    return hashlib.blake2b(values, digest_size=_DIGEST).digest()
