"""From trained weights to a plain checkpoint, predictions and a report."""
