"""The verbs of `mvp-fast data`: make, index and look at images."""
