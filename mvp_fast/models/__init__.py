"""The student that is trained and the frozen teacher whose features are its targets."""
