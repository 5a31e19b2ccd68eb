"""The command line: `main` finds the verb; one file a verb, imported only when it is called."""
