"""The writer: a torch-free process beside each rank that makes staged bytes durable."""
