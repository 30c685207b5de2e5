"""The parts of an export: what is exported, what the files of each format look like, how they are filled.

Called by `dcp_ckpt.ops.export` alone.
"""
