"""Visual embeddings that the drafter keeps by item, because vLLM strips pixels that a prefix hit covers."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KeptEmbeddings:
    """What the drafter may see of one image or video that has `num_embeddings` embeddings in all.

    `indices [num_kept]` (int64, on the host) count among the item's embeddings; `embeddings [num_kept, width]` are the
    drafter's own, where `width` is its hidden size or, with deepstack levels, a multiple of it.
    """

    num_embeddings: int
    indices: torch.Tensor
    embeddings: torch.Tensor

    @property
    def is_whole(self) -> bool:
        return len(self.indices) == self.num_embeddings

    @property
    def num_bytes(self) -> int:
        return self.embeddings.nbytes + self.indices.nbytes


class EmbeddingCache:
    """Least-recently-used cache of `KeptEmbeddings` by item identifier, bounded in bytes."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._items: OrderedDict[str, KeptEmbeddings] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, identifier: str, num_embeddings: int) -> KeptEmbeddings | None:
        """The item, if it is known and has `num_embeddings`: clients may give two items the same identifier."""
        item = self._items.get(identifier)
        if item is None or item.num_embeddings != num_embeddings:
            return None
        self._items.move_to_end(identifier)
        return item

    def put(self, identifier: str, item: KeptEmbeddings) -> None:
        """Store `item`; an item larger than the whole bound is not kept."""
        if (old := self._items.pop(identifier, None)) is not None:
            self.num_bytes -= old.num_bytes
        if item.num_bytes > self.max_bytes:
            return
        self._items[identifier] = item
        self.num_bytes += item.num_bytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._items.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def clear(self) -> None:
        self._items.clear()
        self.num_bytes = 0
