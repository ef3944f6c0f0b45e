"""Speculative decoding for Video-LLMs in unmodified vLLM: a drafter that sees a pruned video."""

__version__ = "0.1.0"
