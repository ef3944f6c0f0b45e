"""Verification: how much a drafted token has to do with what is seen, and which drafted tokens are emitted."""
