"""Kernel and targets become coefficients, with evidence."""
