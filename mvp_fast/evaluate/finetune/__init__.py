"""Fine-tuning for image classification: a pre-trained network with a new head, by the same loop as pre-training."""
