"""Steps that make a package smaller or faster."""
