"""Evidence for distillation: which supervision is better, and by how much."""
