"""The networks: tensors in, tensors out; nothing of Gymnasium, files or the Hub."""
