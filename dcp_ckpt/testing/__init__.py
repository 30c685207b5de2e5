"""What users need to test with and against dcp_ckpt: the storage suite and storages that fail on purpose.

Ships with the package and needs pytest. Nothing here is imported by the rest of the package.
"""
