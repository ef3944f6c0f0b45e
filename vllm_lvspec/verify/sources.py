"""Whose states are compared: what `anchor_source` may name.

`hidden` compares the target's last states, `layer:I` those after I of its layers, `embedding` what goes into the first
layer (projected visual embeddings, and token embeddings), and `value` the last layer's values, which lie in vLLM's own
KV cache. A drafted token has two rows: the one from which it is predicted, and the one that reads it; `:read` takes the
second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FORM = re.compile(r"(hidden|value|layer:(\d+))(:read)?|embedding")
FORMS = "hidden, hidden:read, layer:I, layer:I:read (I layers done), value, value:read or embedding"


@dataclass(frozen=True)
class AnchorSource:
    """`kind`: hidden, layer, value or embedding; `layer`: for the second; `reads`: which row of a drafted token."""

    kind: str
    layer: int | None = None
    reads: bool = False

    @classmethod
    def parse(cls, text: str) -> AnchorSource:
        """Raises ValueError for anything but `FORMS`."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(f"must be one of {FORMS}")
        if match[0] == "embedding":
            return cls("embedding", reads=True)  # no embedding goes with the prediction of a token
        layer = None if match[2] is None else int(match[2])
        return cls(match[1].partition(":")[0], layer, match[3] is not None)
