"""The study: students that learn from different targets, compared on the same sets."""
