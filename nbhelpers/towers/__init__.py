"""Networks that others trained: their code, weights, files and names of tensors."""
