"""Fine-tuning on real data: how long to probe the head, and which backbone to take."""
