"""Speed of infinite-width kernels."""
