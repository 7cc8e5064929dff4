"""How a training step is computed: number formats, compilation, recomputation, kernels for CPUs."""
