"""Saving: who writes what, staging into the arena, and the attempt's way to its commit."""
