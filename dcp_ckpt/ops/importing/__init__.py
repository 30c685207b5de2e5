"""The parts of an import: what each kind of source holds, and how its bytes are read.

Called by `dcp_ckpt.ops.import_checkpoint`, and for what checkpoints hold by `dcp_ckpt.ops.average`.
"""
