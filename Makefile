# Two commands do everything, set-up included: `make demo` and `make test`. `make docs` builds the documentation into site/.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test docs clean

demo: $(READY)
	$(BIN)/fedistill simulate --data phantom --sites 3 --preset quick --ipc 5 --out runs/demo

test: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist worksteal

docs: $(READY)
	$(BIN)/pip install --quiet --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(READY): pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $(READY)

clean:
	rm -rf .venv runs site
