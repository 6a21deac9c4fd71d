"""Two-sample tests: the published table of NTK-MMD, and shifts of images against the usual tests."""
