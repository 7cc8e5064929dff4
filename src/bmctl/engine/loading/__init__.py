"""Data on its way to the model: which samples, decoded, augmented, in batches."""
