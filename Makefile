.PHONY: setup demo test slow soak check bench gpu graphs newest renew bounds clean
PY := .venv/bin/python
INSTALL := -m pip install -q -e '.[tensorrt-rtx,transformers,peft,sklearn,parquet,rl]' --group dev
# Two test processes of one thread each: oversubscribed threads would ruin both.
TEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile

setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	python3 -m venv .venv && $(PY) -m pip install -q -c constraints.txt pip
	$(PY) $(INSTALL) -c constraints.txt && touch $@

demo: setup
	.venv/bin/bmctl run --recipe fashion-mnist --output runs/demo --overwrite

test: setup
	$(TEST)

slow: setup
	$(TEST) -m slow

# A zoo of graphs, every chain of methods on every model, kills at random instants: before a release.
soak: setup
	$(TEST) -m soak

check: setup
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && $(PY) -m pytest -q tests/test_architecture.py

# docs/graphs.md: every third-party graph of the tests, on every backend.
graphs: setup
	OMP_NUM_THREADS=1 $(PY) -m tests.graphs.table

bench: .venv/.bench
	$(PY) -m pytest tests/benchmarks -m bench -s

.venv/.bench: .venv/.done
	$(PY) -m pip install -q -c constraints.txt --group bench && touch $@

# On a machine with CUDA and a Python that has torch and pytest, of which nothing is set up; what else a test needs and
# does not find it names and skips. Packages carried along are found by PYTHONPATH.
gpu: PY := python3
gpu:
	PYTHONPATH="src:$$PYTHONPATH" timeout 480 $(PY) -m pytest -o addopts='-ra --import-mode=importlib' -m gpu tests/gpu

# The quick tests with the newest versions that pyproject.toml allows.
newest: PY := .venv-newest/bin/python
newest:
	python3 -m venv .venv-newest && $(PY) -m pip install -q --upgrade pip
	$(PY) $(INSTALL) --group bench --upgrade --upgrade-strategy eager
	$(TEST)

# constraints.txt anew, from what `make newest` found good.
renew: newest
	.venv-newest/bin/python tests/versions.py installed > constraints.txt

# The quick tests with the oldest versions that pyproject.toml allows.
bounds: PY := .venv-lower/bin/python
bounds:
	python3 -m venv .venv-lower && $(PY) -m pip install -q --upgrade pip
	python3 tests/versions.py oldest > .venv-lower/constraints.txt
	$(PY) $(INSTALL) -c .venv-lower/constraints.txt
	$(TEST)

clean:
	rm -rf .venv .venv-lower .venv-newest build dist .mypy_cache .pytest_cache .ruff_cache
