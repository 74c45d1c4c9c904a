"""Pictures too large for one pass of a model, or for the memory: prediction by tiles, reading and writing by tiles."""
