"""Ablations: each file changes one thing between otherwise equal runs, and reports what it changes."""
