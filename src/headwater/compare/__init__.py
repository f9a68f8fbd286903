"""Several methods on the same tasks, at equal trainable parameters, over seeds."""
