"""Speed and memory of the exact tangent kernel, beside what people write by hand with `torch.func`."""
