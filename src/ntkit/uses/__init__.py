"""One question a kernel can answer per module; siblings do not import each other."""
