"""A network at fixed parameters and its derivatives, per example. The only autograd in the package."""
