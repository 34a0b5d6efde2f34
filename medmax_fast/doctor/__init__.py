"""What is active on a machine, what falls back, and whether the kernels compute right there: `medmax doctor`."""
