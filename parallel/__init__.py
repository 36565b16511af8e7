"""Meshes, axis names, collectives, checkpoints; knows no model."""
