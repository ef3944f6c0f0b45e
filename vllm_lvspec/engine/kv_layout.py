"""Where keys and values lie in a page of vLLM's KV cache, asked of the attention backend itself.

Every backend writes keys and values its own way, and on CPUs even packs them by instruction set. Instead of knowing the
ways, numbered keys and values are written into one spare page by the backend's own means, and looked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_lvspec.kernels.copy_slots import PagedCaches, copy_slots

_BASE = 128  # all whole numbers below it are exact in bfloat16


class UnknownLayoutError(ValueError):
    """Keys and values of this KV cache can't be found."""


class KVLayout:
    """`keys`, `values [block_size, num_kv_heads, head_size]`: places in a page, counted in elements; on the host.

    `is_strided`: whether `cache[..., :head_size]` are the keys and the rest the values. Raises UnknownLayoutError for
    quantised caches and for backends that don't write where they are told.
    """

    def __init__(self, layer: Any, spec: FullAttentionSpec, cache: torch.Tensor):
        if not hasattr(layer.impl, "do_kv_cache_update"):
            raise UnknownLayoutError(f"{type(layer.impl).__name__} writes keys and values nobody knows when")
        if cache.ndim != 4 or cache.dtype.itemsize < 2:
            raise UnknownLayoutError(f"a KV cache of {cache.ndim} dimensions in {cache.dtype}")
        _, heads, self.block_size, content = cache.shape
        shape = (self.block_size, heads, spec.head_size)
        strides = cache.stride()
        self.page_elements = 1 + sum((n - 1) * s for n, s in zip(cache.shape[1:], strides[1:], strict=True))
        page = torch.empty(self.page_elements, dtype=cache.dtype, device=cache.device)
        view = page.as_strided((1, *cache.shape[1:]), (self.page_elements, *strides[1:]))
        count = 2 * self.block_size * heads * spec.head_size
        numbers = torch.arange(count, device=cache.device).view(2, *shape)
        slots = torch.arange(self.block_size, device=cache.device)
        found = torch.zeros(self.page_elements, dtype=torch.int64, device=cache.device)
        power = 1
        while power < count:
            page.fill_(-1)
            key, value = (numbers // power % _BASE).to(cache.dtype)
            layer.impl.do_kv_cache_update(layer, key, value, view, slots)
            digits = page.long()
            found = torch.where((digits < 0) | (found < 0), -1, found + digits * power)
            power *= _BASE
        found = torch.where(found < count, found, -1)
        places = torch.full((count,), -1, device=cache.device)
        places[found[found >= 0]] = torch.arange(self.page_elements, device=cache.device)[found >= 0]
        if int((found >= 0).sum()) != count or int(places.min()) < 0:
            raise UnknownLayoutError(
                f"{type(layer.impl).__name__} does not write all keys and values where they are found"
            )
        self.keys, self.values = places.view(2, *shape).cpu()
        grid = torch.arange(self.page_elements).as_strided(tuple(cache.shape[1:]), strides[1:]).transpose(0, 1)
        size = spec.head_size
        self.is_strided = (
            content == 2 * size
            and bool((grid[..., :size] == self.keys).all())
            and bool((grid[..., size:] == self.values).all())
        )
        self._content = torch.cat([self.keys.flatten(1), self.values.flatten(1)], dim=1).to(cache.device)
        self._sources: PagedCaches | None = None
        self._destinations: PagedCaches | None = None

    def _pages(self, cache: torch.Tensor) -> torch.Tensor:
        return cache.as_strided((len(cache), self.page_elements), (cache.stride(0), 1))

    def read_keys(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Keys `[num_tokens, num_kv_heads, head_size]` of these slots (int64)."""
        blocks, rows = slots // self.block_size, slots % self.block_size
        keys = self.keys.flatten(1).to(cache.device)
        return self._pages(cache)[blocks[:, None], keys[rows]].view(len(slots), *self.keys.shape[1:])

    def copy(
        self,
        sources: Sequence[torch.Tensor],
        destinations: Sequence[torch.Tensor],
        source_slots: torch.Tensor,
        destination_slots: torch.Tensor,
    ) -> None:
        """Copy keys and values of `source_slots` (int64) to `destination_slots`, in caches of all layers.

        Both must have this layout, though not this number of pages.
        """
        if self.is_strided:
            # The pointers' table is kept: it changes when vLLM makes its cache anew.
            if self._sources is None or self._sources.caches[0].data_ptr() != sources[0].data_ptr():
                self._sources = PagedCaches.of(sources)
            if self._destinations is None or self._destinations.caches[0].data_ptr() != destinations[0].data_ptr():
                self._destinations = PagedCaches.of(destinations)
            copy_slots(self._sources, self._destinations, source_slots, destination_slots)
            return
        source_pages, source_rows = source_slots[:, None] // self.block_size, source_slots % self.block_size
        pages, rows = destination_slots[:, None] // self.block_size, destination_slots % self.block_size
        source_places, places = self._content[source_rows], self._content[rows]
        for source, destination in zip(sources, destinations, strict=True):
            self._pages(destination)[pages, places] = self._pages(source)[source_pages, source_places]
