"""Stopping in time: signals and wall-clock limits become one answer on all ranks at the same call.

Knows nothing of states, checkpoints and storage. Called by the checkpointer.
"""
