"""The only place that knows vLLM's internals."""
