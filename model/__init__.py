"""One decoder, its layers, memories, cost and weights."""
