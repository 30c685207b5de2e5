"""The life of checkpoints in storage: epochs, commit, recover, catalogue, retention. No torch."""
