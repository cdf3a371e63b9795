"""hidden states and the head's weight to log-probabilities of the targets."""
