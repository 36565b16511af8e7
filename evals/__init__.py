"""Judge a model: look at what it does."""
