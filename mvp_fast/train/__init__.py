"""The training run: the step, the loop around it, checkpoints, ranks, guards and telemetry."""
