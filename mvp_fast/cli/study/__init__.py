"""`mvp-fast study`: run it, in processes that stay."""
