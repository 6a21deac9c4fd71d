"""Derivatives become a matrix that is read in tiles."""
