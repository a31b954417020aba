"""From a plan to trained weights: the loop, the processes, the checkpoints."""
