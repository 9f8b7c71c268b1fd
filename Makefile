# Everything a fresh machine needs: `make demo`, `distill` and `policy` train and compare, `make test` checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo distill policy test thorough packages fuzz lint docs bench release clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cli,deepspeed,transformers,bench,docs,examples,release,test]'
	touch $@

demo: install
	$(BIN)/python examples/demo.py

distill: install
	$(BIN)/python examples/distill.py

policy: install
	$(BIN)/python examples/policy.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy chunked_ce
	$(BIN)/pyright --pythonpath $(BIN)/python

# Four workers of one thread each for two cores: many tests wait for processes that they start. Threads of a test that
# asks for more sleep while they wait, and processes share the bytecode of what they import.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder
test: lint
	$(PYTEST) -m "not thorough"

# What `make test` leaves out: calls compiled in more ways, and DeepSpeed's launcher.
thorough: install
	$(PYTEST) -m thorough

# The same numbers as other people's packages: TRL, Liger, CCE, verl and torchtitan, in an environment of their own, and
# the last TRL without a fused head, in another one with the Transformers that it knows.
PACKAGES := .venv-packages
TRL024 := .venv-packages-trl024
packages: $(PACKAGES)/.installed $(TRL024)/.installed
	OMP_NUM_THREADS=1 $(PACKAGES)/bin/python -m pytest -q tests/packages
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PACKAGES)/bin/python -m pytest -q tests/packages/test_liger_names.py
	OMP_NUM_THREADS=1 $(TRL024)/bin/python -m pytest -q tests/packages/test_trl_024.py

$(PACKAGES)/.installed: setup.cfg pyproject.toml constraints.txt tests/packages/requirements.txt
	$(PYTHON) -m venv $(PACKAGES)
	$(PACKAGES)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(PACKAGES)/bin/python -m pip install --quiet --constraint constraints.txt --requirement tests/packages/requirements.txt
	$(PACKAGES)/bin/python -m pip install --quiet --no-deps verl==0.9.1 torchtitan==0.3.0 --editable .
	touch $@

$(TRL024)/.installed: setup.cfg pyproject.toml constraints.txt tests/packages/requirements-trl024.txt
	$(PYTHON) -m venv $(TRL024)
	$(TRL024)/bin/python -m pip install --quiet --constraint constraints.txt torch
	grep -vE '^(fsspec|huggingface_hub|tokenizers|transformers)==' constraints.txt > $(TRL024)/constraints.txt
	$(TRL024)/bin/python -m pip install --quiet --constraint $(TRL024)/constraints.txt --requirement tests/packages/requirements-trl024.txt
	$(TRL024)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Random calls beyond those of the tests, right ones and wrong ones: some five minutes.
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seed 2000 --cases 20000
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz_arguments --seed 1 --seconds 120

# The documentation site, in build/site; needs no network.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# All that stands in benchmarks/results, and the pictures made of it: some hours on 2 cores, and nothing else should run
# meanwhile. docs/benchmarks.md says which page shows what; `python docs/comparison.py` then writes the pages' tables.
RESULTS := benchmarks/results
SWEEP := --tokens 4096 --hidden 256 --sweep vocab=32768,65536,131072 --rounds 3 \
	--only forward backward least full compiled deepspeed
FILTERED := runs/filtered
bench: install
	$(BIN)/chunked-ce bench $(SWEEP) --dtype bf16 --json $(RESULTS)/vocabulary.json --plot docs/vocabulary.png
	$(BIN)/chunked-ce bench --tokens 1024 --hidden 256 --dtype fp32 --sweep vocab=16384,32768,65536 --rounds 3 --no-errors \
		--only forward backward least full compiled deepspeed --json $(RESULTS)/vocabulary_fp32.json
	$(BIN)/python -m benchmarks.ratios --json $(RESULTS)/ratios.json
	$(BIN)/python -m benchmarks.objectives --json $(RESULTS)/objectives.json
	$(BIN)/python -m benchmarks.memory --tokens 1024 2048 4096 8192 16384 --vocab 32768 65536 131072 262144 --full-up-to 0 \
		--json $(RESULTS)/memory_law.json
	$(BIN)/python -m benchmarks.verify --json $(RESULTS)/verify.json
	$(BIN)/python -m benchmarks.vocab_parallel --json $(RESULTS)/vocab_parallel.json
	$(BIN)/python -m benchmarks.sharded_head --tokens 512 --repeats 3 --json $(RESULTS)/sharded_head.json
	$(BIN)/python examples/filtered_training.py --width 256 --depth 3 --steps 120 --learning-rate 4e-4 --out $(FILTERED)
	cp $(FILTERED)/losses.json $(RESULTS)/filtered_training.json
	cp $(FILTERED)/losses.png docs/filtered.png
	$(BIN)/python examples/filtered_training.py --width 1024 --depth 2 --steps 300 --learning-rate 1.5e-4 --out $(FILTERED)-wide
	$(BIN)/chunked-ce bench --tensors $(FILTERED)-wide/head.pt --dtype bf16 --only forward filtered full --rounds 3 --no-errors \
		--json $(RESULTS)/filtered.json
	if test -e $(PACKAGES)/.installed; then $(PACKAGES)/bin/python -m benchmarks.ratios --tokens 512 --ignored 0 \
		--only forward full trl liger-scaled --repeats 5 --json $(RESULTS)/ratios_packages.json; fi

# A wheel and an sdist in dist/, each tried in an environment of its own: the wheel with torch alone, the sdist with its
# tests. REPOSITORY is the address of the repository, for the package's links.
REPOSITORY ?=
BARE := build/bare
release: install
	rm -rf dist build
	CHUNKED_CE_REPOSITORY=$(REPOSITORY) $(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(BARE)/wheel
	$(BARE)/wheel/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(BARE)/wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd $(BARE) && wheel/bin/chunked-ce --version
	cd $(BARE) && wheel/bin/python ../../tests/bare_wheel.py
	tar --extract --gzip --file dist/*.tar.gz --directory $(BARE) --transform 's,^[^/]*,sdist,'
	$(MAKE) --directory $(BARE)/sdist install
	cd $(BARE)/sdist && $(PYTEST) tests/test_values.py tests/test_docs.py tests/test_release.py

clean:
	rm -rf build dist $(VENV) $(PACKAGES) $(TRL024) runs
