"""The tests of dualview; the folders mirror those of the package."""
