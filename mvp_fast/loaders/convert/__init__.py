"""Writes a data set anew in a form that loads faster: `shards` are WebDataset's tar files, a `beton` is FFCV's file."""
