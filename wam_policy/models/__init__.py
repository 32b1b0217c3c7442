"""Neural networks of both families: tensors in, tensors out."""
