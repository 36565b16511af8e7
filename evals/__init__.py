"""Judge a model: look at what it does, and measure what it gets right of what it never saw."""
