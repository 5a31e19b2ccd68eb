"""Pictures of what a network sees: attention, patch features as colour, similarity, and words on patches."""
