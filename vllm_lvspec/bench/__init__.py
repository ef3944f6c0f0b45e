"""Measuring drafting and verification: data, peers, runs, reports."""
