"""Pages of the drafter's KV cache: who owns which, and how much of each request is cached."""

from __future__ import annotations

from dataclasses import dataclass, field

NO_SLOT = -1  # of a token that is written nowhere


class PagePool:
    """A fixed number of pages of `page_size` tokens; page ids run from 0 to `num_pages - 1`."""

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages}: the drafter's KV cache must hold at least one page")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def has_room(self, num_tokens: int) -> bool:
        """Whether it has pages for another `num_tokens`."""
        return -(-num_tokens // self.page_size) <= len(self._free)

    def grow(self, pages: list[int], num_tokens: int) -> bool:
        """Extend `pages` so that they hold `num_tokens`; all or nothing, False where the pool can't."""
        missing = -(-num_tokens // self.page_size) - len(pages)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            pages.append(self._free.pop())
        return True

    def release(self, pages: list[int]) -> None:
        """Take back all of `pages` and empty the list."""
        self._free.extend(pages)
        pages.clear()


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
