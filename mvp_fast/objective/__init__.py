"""The objective: which tokens are predicted, how targets are normalised, and the loss."""
