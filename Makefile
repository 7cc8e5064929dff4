.PHONY: setup demo test slow check bench graphs bounds clean
PY := .venv/bin/python
# Two test processes of one thread each: oversubscribed threads would ruin both.
TEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

setup: .venv/.done

.venv/.done: pyproject.toml
	python3 -m venv .venv && $(PY) -m pip install -q 'pip>=25.1'
	$(PY) -m pip install -q -e '.[tensorrt-rtx,transformers,peft,sklearn]' --group dev && touch $@

demo: setup
	.venv/bin/bmctl run --recipe fashion-mnist --output runs/demo --overwrite

test: setup
	$(TEST)

slow: setup
	$(TEST) -m slow

check: setup
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && $(PY) -m pytest -q tests/test_architecture.py

# docs/graphs.md: every third-party graph of the tests, on every backend.
graphs: setup
	OMP_NUM_THREADS=1 $(PY) -m tests.graphs.table

bench: .venv/.bench
	$(PY) -m pytest tests/benchmarks -m bench -s

.venv/.bench: .venv/.done
	$(PY) -m pip install -q --group bench && touch $@

# The same tests with the oldest versions that pyproject.toml allows.
bounds:
	python3 -m venv .venv-lower && .venv-lower/bin/python -m pip install -q 'pip>=25.1'
	python3 tests/lower_bounds.py > .venv-lower/constraints.txt
	.venv-lower/bin/python -m pip install -q -c .venv-lower/constraints.txt -e '.[tensorrt-rtx,transformers,peft,sklearn]' --group dev
	OMP_NUM_THREADS=1 .venv-lower/bin/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf .venv .venv-lower build dist .mypy_cache .pytest_cache .ruff_cache
