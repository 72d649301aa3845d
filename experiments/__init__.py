"""Recipes: each file composes one run, top to bottom."""
