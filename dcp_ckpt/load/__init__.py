"""Loading: choose, diff, read exactly what this rank needs, verify, restore."""
