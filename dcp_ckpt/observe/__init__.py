"""What happens to the checkpoints of a training, as events for people and programs. Decides nothing."""
