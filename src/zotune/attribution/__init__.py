"""What a run's journal says about its training examples: each one's share of the change of a validation loss."""
