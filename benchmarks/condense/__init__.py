"""Evidence for condensation: the published curve, and few points of Fashion-MNIST against plain choices."""
