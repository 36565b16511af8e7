"""Judge a model: what it gets right of what it never saw."""
