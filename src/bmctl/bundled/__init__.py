"""Data that comes with the package; `make.py` says how it was made."""
