"""The verbs of `mvp-fast teacher`: make one."""
