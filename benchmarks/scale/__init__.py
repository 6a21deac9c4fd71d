"""Runs of full size on real data: each one command, with progress, resumable, recorded in `results`."""
