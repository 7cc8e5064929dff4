"""One model in the hands of several processes."""
