"""Features of visual tokens, in pages that carry the target's own block ids.

They are written by slot when the target computes the tokens and read through a request's block table, so that they live
and die with the blocks: prefix hits, chunked prefill and preemption need no bookkeeping.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Layout:
    """How much one rank holds: every `num_shares`-th slot of a block, from its own number on.

    Shares are of slots, not of columns: the largest cosines of all shares are found from the largest of each.
    """

    num_blocks: int
    block_size: int
    width: int
    rank: int = 0
    num_shares: int = 1

    @property
    def slots_per_block(self) -> int:
        return self.block_size // self.num_shares

    def bytes_per_block(self, dtype: torch.dtype) -> int:
        return self.slots_per_block * self.width * dtype.itemsize

    def own(self, positions: np.ndarray) -> np.ndarray:
        """Which of `positions` (places in a sequence) this rank holds."""
        return positions % self.num_shares == self.rank

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Where this rank's own `positions` stand among those it holds, `slots_per_block` of them to a block."""
        return positions // self.num_shares


def num_shares(block_size: int, num_ranks: int) -> int:
    """Ranks share a block's slots evenly, or hold all of them each."""
    return num_ranks if block_size % num_ranks == 0 else 1


class FeatureCache:
    """`features [num_blocks, slots_per_block, 1, width]`, and which item each slot's feature came from.

    The items' tags stay on the host and cover all slots on every rank, so that all ranks find the same ones missing.
    Where features are read from a cache of vLLM's own, `dtype` is None and only tags are kept.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype | None, device: torch.device):
        self.layout = layout
        shape = (layout.num_blocks, layout.slots_per_block, 1, layout.width)
        self.features = None if dtype is None else torch.zeros(shape, dtype=dtype, device=device)
        self.tags = np.zeros((layout.num_blocks, layout.block_size), dtype=np.int64)

    @property
    def num_bytes(self) -> int:
        return 0 if self.features is None else self.features.nbytes

    def note(self, block_ids: np.ndarray, positions: np.ndarray, tags: np.ndarray) -> None:
        """Say that the visual tokens at `positions` of a sequence with blocks `block_ids` are now of items `tags`."""
        size = self.layout.block_size
        self.tags[block_ids[positions // size], positions % size] = tags

    def holds(self, block_ids: np.ndarray, positions: np.ndarray, tags: np.ndarray) -> bool:
        """Whether the features of all `positions` are those of items `tags`."""
        size = self.layout.block_size
        if len(positions) and positions.max() // size >= len(block_ids):
            return False
        return bool(np.array_equal(self.tags[block_ids[positions // size], positions % size], tags))

    def write(self, states: torch.Tensor, blocks: torch.Tensor, slots: torch.Tensor) -> None:
        """Store `states [num_tokens, width]` at `blocks`, `slots` (int64, `slots` within this rank's share)."""
        assert self.features is not None
        self.features[blocks, slots, 0] = states.to(self.features.dtype)


def tag_of(identifier: str) -> int:
    """A number for an item's identifier; never 0, which stands for nothing."""
    digest = hashlib.blake2b(identifier.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


class Projection:
    """Random signs that keep cosines nearly, from `width` down to `reduced` columns (Johnson-Lindenstrauss).

    The same on every rank and in every run.
    """

    def __init__(self, width: int, reduced: int, dtype: torch.dtype, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (width, reduced), generator=generator, dtype=torch.int8)
        self.matrix = ((2.0 * signs - 1.0) / reduced**0.5).to(device, dtype)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, width]` to `[num_tokens, reduced]`."""
        return states.to(self.matrix.dtype) @ self.matrix
