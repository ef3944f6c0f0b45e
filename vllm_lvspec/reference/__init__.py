"""A small Video-LLM pair that has learned to describe moving coloured shapes, and how it was trained."""

from pathlib import Path

_ROOT = Path(__file__).parent
TARGET = _ROOT / "checkpoints" / "target"
DRAFT = _ROOT / "checkpoints" / "draft"
CLIPS = _ROOT / "clips"
