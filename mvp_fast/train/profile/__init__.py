"""`mvp-fast train --profile`: where each millisecond of a step goes, what limits it, and what to change."""
