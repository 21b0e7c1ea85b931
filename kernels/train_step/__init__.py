"""A training step in two launches: forward, loss and backward by rows; then gradients and update."""
