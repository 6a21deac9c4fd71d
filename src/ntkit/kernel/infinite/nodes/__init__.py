"""Handlers of the nodes of a traced module, by subject."""
