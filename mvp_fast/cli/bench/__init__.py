"""The verbs of `mvp-fast bench`: run the benchmarks, compare revisions, and draw the history of the results."""
