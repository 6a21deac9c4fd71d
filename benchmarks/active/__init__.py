"""Active learning on real data: what a label is worth that each strategy buys, and how long choosing takes."""
