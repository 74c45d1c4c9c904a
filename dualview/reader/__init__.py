"""Pages of glyphs to read, the training of the small vision tower on them, and the embedded model."""
