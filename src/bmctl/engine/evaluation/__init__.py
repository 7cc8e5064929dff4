"""What a model or an artifact is worth: scores, sizes, times, and how sure they are."""
