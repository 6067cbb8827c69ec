"""Training and evaluating a detector."""
