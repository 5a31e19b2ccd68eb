"""Training a CLIP of our own on images and captions, to be a teacher."""
