"""What users need to test with and against dcp_ckpt: the storage suite, storages that fail on purpose, a disk
that loses what was not synced, an S3 server and a network that fails on purpose.

Ships with the package; the suites need pytest, the server a program of its own. Nothing here is imported by
the rest of the package.
"""
