"""Pages of the drafter's KV cache: who owns which, and how much of each request is cached."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

NO_SLOT = -1  # of a token that is written nowhere


class PagePool:
    """A fixed number of pages of `page_size` tokens; page ids run from 0 to `num_pages - 1`.

    A page may have several owners, and a key by which it is found again until it is given to somebody else. Of pages
    without owners those go first that nobody finds, then those that were given back first.
    """

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages}: the drafter's KV cache must hold at least one page")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = OrderedDict.fromkeys(range(num_pages))
        self._num_owners = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._pages: dict[bytes, int] = {}  # by their keys

    @property
    def num_free(self) -> int:
        """Pages without owners."""
        return len(self._free)

    def has_room(self, num_tokens: int, found: Sequence[int] = ()) -> bool:
        """Whether it has pages for another `num_tokens`, of which the first are in pages that were `found`."""
        num_free = len(self._free) - sum(not self._num_owners[page] for page in found)
        return -(-num_tokens // self.page_size) - len(found) <= num_free

    def grow(self, pages: list[int], num_tokens: int) -> bool:
        """Extend `pages` so that they hold `num_tokens`; all or nothing, False where the pool can't."""
        missing = -(-num_tokens // self.page_size) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            page, _ = self._free.popitem(last=False)
            if (key := self._keys[page]) is not None:
                self._keys[page] = None
                del self._pages[key]
            self._num_owners[page] = 1
            pages.append(page)
        return True

    def release(self, pages: list[int]) -> None:
        """Take back all of `pages` from one of their owners and empty the list."""
        for page in reversed(pages):  # without the beginning of a text nobody finds the rest
            self._num_owners[page] -= 1
            if not self._num_owners[page]:
                self._free[page] = None
                self._free.move_to_end(page, last=self._keys[page] is not None)
        pages.clear()

    def name(self, pages: Sequence[int], keys: Sequence[bytes]) -> None:
        """Have `pages`, which nobody writes any more, found by `keys`, one each, unless another one is already."""
        for page, key in zip(pages, keys, strict=True):
            if self._keys[page] is None and key not in self._pages:
                self._keys[page] = key
                self._pages[key] = page

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the first of `keys`, as far as there are any."""
        return list(itertools.takewhile(lambda page: page >= 0, (self._pages.get(key, -1) for key in keys)))

    def forget_keys(self) -> None:
        """Have no page found that is there now."""
        self._pages.clear()
        self._keys = [None] * self.num_pages

    def share(self, pages: Sequence[int]) -> None:
        """Give them another owner."""
        for page in pages:
            if not self._num_owners[page]:
                del self._free[page]
            self._num_owners[page] += 1


@dataclass
class DraftSequence:
    """What the drafter holds of one request.

    `kept`: indices of the prompt's tokens that the drafter sees, ascending. Its cache holds the kept prompt followed
    by generated tokens, `num_cached` of them in all; rolling back is setting that number.
    """

    num_prompt_tokens: int
    kept: list[int]
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0

    @property
    def num_hidden(self) -> int:
        """Prompt tokens that the drafter does not see."""
        return self.num_prompt_tokens - len(self.kept)
