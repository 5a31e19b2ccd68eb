"""The student that is trained and the frozen teachers whose features are its targets."""
