"""The command line `dcp-ckpt`: thin commands that start without torch, numpy and rich."""
