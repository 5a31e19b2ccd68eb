"""What is seen and when: the index of a data set and the sample plan, decided before any pixel is touched."""
