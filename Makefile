.PHONY: setup demo test slow check bench clean
PY := .venv/bin/python

setup: .venv/.done

.venv/.done: pyproject.toml
	python3 -m venv .venv && $(PY) -m pip install -q 'pip>=25.1'
	$(PY) -m pip install -q -e '.[tensorrt-rtx,transformers,sklearn]' --group dev && touch $@

demo: setup
	.venv/bin/bmctl run --recipe fashion-mnist --output runs/demo --overwrite

test: setup
	$(PY) -m pytest

slow: setup
	$(PY) -m pytest -m slow

check: setup
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && $(PY) -m pytest -q tests/test_architecture.py

bench: setup
	$(PY) -m pytest tests/benchmarks -m bench -s

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
