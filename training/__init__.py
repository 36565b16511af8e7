"""Losses, optimizers, the step and the loop."""
