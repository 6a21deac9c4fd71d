"""Support vector machines with tangent kernels on small data, beside other classifiers."""
