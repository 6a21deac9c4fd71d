"""What it costs to watch a training run."""
