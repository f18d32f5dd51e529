# Works with GNU make 3.81 (macOS) and later. `make help` lists the targets.
PYTHON ?= python3
PROFILE ?= small
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
XLA := .venv-xla
COLAB := .venv-colab
COLAB_PYTHON ?= python3.13

.PHONY: help env report verify-report slides test unit nbval test-slow test-xla test-colab test-faults links check chapter normalize format diff hooks badges wheel bench lab clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(READY) ## make the virtual environment .venv from the project's own files

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "needs Python 3.11 to 3.13, found: `$(PYTHON) --version`; name another: make env PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS) --editable '.[all]'
	@touch $@

report: $(READY) ## execute what changed and build HTML and PDF (PROFILE=small; -j2 for two notebooks at a time; OPTIONS="--keep 8")
	+@$(PY) -m bigmodel_utils.report build --profile $(PROFILE) $(OPTIONS)

verify-report: $(READY) ## build the report again from its recorded commit and parameters, and compare (PROFILE=small)
	@$(PY) -m bigmodel_utils.report verify --profile $(PROFILE)

slides: $(READY) ## slide shows of the notebooks, in build/slides; they open without a network
	@$(PY) -m bigmodel_utils.report slides

test: $(READY) check unit nbval ## everything that must pass

test-xla: $(XLA)/.ready ## device tests, and notebooks 5 and 6 against the CPU, under torch_xla (Linux, 9 GB; no TPU)
	PJRT_DEVICE=CPU $(XLA)/bin/python -m pytest -q tests/test_device.py tests/xla

# Colab's TPU runtime has these versions of torch and torch_xla; the rest is the tested set.
$(XLA)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(XLA)
	grep -v '^torch' constraints.txt > $(XLA)/constraints.txt
	$(XLA)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(XLA)/constraints.txt $(PIP_ARGS) \
	  torch==2.9.0 torch_xla==2.9.0 --editable '.[data,files,report,test]'
	@touch $@

test-colab: $(READY) $(COLAB)/.ready ## chapters 0, 3 and 5 beside the packages that Colab preinstalls (Linux, Python 3.13, 8 GB)
	BIGMODEL_COLAB=$(COLAB) $(PY) -m pytest -q -m slow tests/test_colab.py -k runs_with

$(COLAB)/.ready: tests/data/colab_runtimes.csv
	$(COLAB_PYTHON) -m venv $(COLAB)
	awk -F '[,+]' '$$1 == "cpu" && $$2 != "python" {print $$2 "==" $$3}' $< > $(COLAB)/requirements.txt
	$(COLAB)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --requirement $(COLAB)/requirements.txt
	@touch $@

test-faults: $(READY) ## kill a build at 50 random moments, fill its disk and memory (some 15 minutes)
	BIGMODEL_KILLS=50 $(PY) -m pytest -q tests/test_faults.py

links: $(READY) ## ask for every page elsewhere that the report links to (needs the network)
	CHECK_LINKS=1 $(PY) -m pytest -q tests/test_browser.py -k links_to_elsewhere

check: $(READY) ## lint of code and notebooks
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m bigmodel_utils.report check

unit: $(READY) ## unit, report, runner and browser tests, two files at a time
	$(PY) -m pytest -q -n 2 --dist loadfile

test-slow: $(READY) ## what takes minutes: Colab's versions before pip's resolver, Run All in a real JupyterLab
	$(PY) -m pytest -q -m slow

nbval: $(READY) ## run every notebook again and compare with its stored outputs
	TQDM_DISABLE=1 $(PY) -m pytest -q --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg notebooks

chapter: $(READY) ## add a chapter that passes every check, to be made yours (NAME=16_robots)
	@test -n "$(NAME)" || { echo "say which: make chapter NAME=16_robots"; exit 2; }
	@$(PY) -m bigmodel_utils.report new $(NAME)

normalize: $(READY) ## bring notebooks into the form in which they are committed
	$(PY) -m bigmodel_utils.report normalize

format: $(READY) ## format code and notebooks
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

diff: $(READY) ## what changed in notebooks since the last commit, cell by cell (SINCE=main for a branch)
	$(VENV)/bin/nbdiff --ignore-details $(or $(SINCE),HEAD) notebooks

hooks: $(READY) ## check every commit (.pre-commit-config.yaml), and let git show notebooks cell by cell
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) 'pre-commit>=4'
	$(PY) -m pre_commit install
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" nbdime config-git --enable

badges: $(READY) ## write the course's public address (pyproject.toml) into notebooks and README
	$(PY) -m bigmodel_utils.report badges

wheel: $(READY) ## build dist/bigmodel_utils-*.whl, to upload to Colab by hand
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .

bench: $(READY) ## speed beside others' programs, saving beside training, and the report's own times (some 15 minutes)
	@$(PY) benchmarks/speed.py
	@$(PY) benchmarks/checkpoint_stall.py
	@$(PY) benchmarks/report_times.py $(PROFILE)

lab: $(READY) ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab notebooks

clean: ## delete what was built; the environment stays
	rm -rf build dist
