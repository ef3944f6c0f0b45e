"""Draw the training curves of the bundled pairs, as their card shows them.

python -m vllm_lvspec.reference.curves vllm_lvspec/reference/curves.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vllm_lvspec.reference import PAIRS

CURVES = {"answer_loss": "loss on answers", "patch_loss": "loss on patch words", "right": "fact words right"}
_WINDOW = 6  # logged batches, of which the mean is drawn


def draw(path: Path) -> None:
    """Write a PNG: a column for each of `CURVES`, a row for each family, a line for each model."""
    figure = Figure(figsize=(11, 2.6 * len(PAIRS)), layout="constrained")
    grid = figure.subplots(len(PAIRS), len(CURVES), squeeze=False)
    for row, (family, pair) in zip(grid, PAIRS.items(), strict=True):
        for axes, (key, title) in zip(row, CURVES.items(), strict=True):
            for role in ("target", "draft"):
                log = json.loads((getattr(pair, role) / "training_log.json").read_text())["log"]
                values = np.convolve([entry[key] for entry in log], np.ones(_WINDOW) / _WINDOW, "valid")
                axes.plot([entry["step"] for entry in log][_WINDOW - 1 :], values, label=role)
            axes.set_title(f"{family}: {title}", fontsize="medium")
            axes.set_xlabel("step")
            axes.set_ylim(0, 1 if key == "right" else 2)
            axes.grid(alpha=0.3)
    grid[0, 0].legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
