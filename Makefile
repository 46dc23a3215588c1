# make demo: embed the built-in sample, fine-tune on it, name a cruise.   make test: run the tests.
# Both set up their own virtual environment first; a second run installs nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.cfg

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/python -m bioscan_xla.sample demo
	$(BIN)/python -m bioscan_xla.embed --config configs/embed_demo.yaml
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
		--dynamo_backend no launch/finetune.py --config configs/finetune_demo.yaml
	$(BIN)/python -m bioscan_xla.classify --input demo/asv.fasta --reference demo/embeddings.db \
		--table demo/counts.tsv --samples demo/samples.tsv --output demo/classified
	@echo
	@echo "Names of the cruise: demo/classified/taxonomy.tsv. Open demo/classified/report.html."
	@echo "The reference is demo/embeddings.db, a fine-tuned classifier demo/classifier. Search it:"
	@echo
	@echo "    $(BIN)/python -m bioscan_xla.search --db demo/embeddings.db demo/query.fasta -k 3"

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .[test]
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .[plan]
	touch $@

$(VENV)/installed-dev: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .[dev]
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
