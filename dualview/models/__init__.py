"""Encoders and models assembled from the ops."""
