"""What a trained student is worth: probes, fine-tuning, segmentation, pictures."""
