"""From a source of examples to checked splits, a task and batches."""
