"""The Triton kernels, an operation a file: its formula, forward and backward, and its torch.library operator."""
