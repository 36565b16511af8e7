"""One value a run, one file a run."""
