"""From a backbone name to a model with a head and ordered layer groups."""
