.PHONY: setup demo test slow check bench clean
BIN := .venv/bin

setup: .venv/.done
