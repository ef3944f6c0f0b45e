"""The drafter: its model, its private paged KV cache, its pruned view of a video, and the proposing of tokens."""
