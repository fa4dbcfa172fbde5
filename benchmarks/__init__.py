"""Step times against torch.optim and the matmul floor: `python -m benchmarks --help`."""
