"""What this machine has for training, part by part, each tried out; `mvp-fast doctor` shows it."""
