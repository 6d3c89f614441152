# Needs Python 3.11 or newer, git and make; everything else is installed into .venv.

PYTHON ?= python3
COHORT ?= phantom

PY := .venv/bin/python
BOOT := .venv/.medsec-boot
READY := .venv/.medsec-ready
PIPELINE := $(if $(filter phantom,$(COHORT)),dvc.yaml,pipelines/$(COHORT)/dvc.yaml)
# All but the records: `dvc repro -f` of the whole file would call them up to date without running them.
STAGES = $(addprefix $(PIPELINE):,$(shell sed -n 's/^  \([0-9a-z_]*\):$$/\1/p' $(PIPELINE) | grep -v '^record_'))
SOURCES := $(wildcard notebooks/*.ipynb exercises/*.ipynb exercises/solutions/*.ipynb examples/*.ipynb)
EXECUTED := $(sort $(wildcard executed/phantom/*.ipynb))

# DVC stages say "python": it must be that of .venv. One thread per process: another number gives other bits.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
export DVC_NO_ANALYTICS := 1
# Without the cache of compiled modules every process of the pipeline would compile some thousand files again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help checkout setup data repro test test-deployment fuzz bench record lab book slides lock clean

help: ## this list
	@echo "Usage: make TARGET [COHORT=phantom] [PYTHON=python3]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' Makefile
	@echo "Without a GPU, PyTorch's much smaller CPU build will do: make setup UV_TORCH_BACKEND=cpu"

# DVC and the comparison with the committed tables need git; whoever unpacked an archive has none.
checkout:
	@test -e .git || { echo "error: this folder is no git repository: clone it, or here: git init && git add -A && git commit -qm start" >&2; \
	  exit 1; }

setup: $(READY) ## make .venv and install everything (again only after a change of the pinned versions)

$(BOOT):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed and $(PYTHON) is not; name one, like: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv and ensurepip; install them (Debian, Ubuntu: the package python3-venv)" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv --clear .venv
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: the environment in .venv is of an older Python; remove the folder and try again" >&2; exit 1; }
	@$(PY) -c 'import pip' 2>/dev/null || $(PY) -m ensurepip >/dev/null
	@$(PY) -m uv --version >/dev/null 2>&1 || $(PY) -m pip install --quiet --disable-pip-version-check uv
	@touch $@

$(READY): $(BOOT) pyproject.toml requirements.lock
	$(PY) -m uv pip install --python $(PY) -e ".[dev]" -c requirements.lock
	@touch $@

data: $(READY) ## fetch the default cohort (from this repository)
	$(PY) -m dvc pull

repro: checkout $(READY) ## really rerun a cohort's pipeline and compare its tables with the committed ones
	@test -f "$(PIPELINE)" || { echo "error: no pipeline for COHORT=$(COHORT): $(PIPELINE) does not exist" >&2; exit 1; }
	$(PY) -m dvc pull
	MEDSEC_FRESH=1 $(PY) -m experiments cells --cohort $(COHORT)
	$(PY) -m dvc repro -f -s $(STAGES)
	$(PY) -m experiments check --cohort $(COHORT)

test: $(READY) ## everything that CI runs: style, tests, and a replay of the executed notebooks
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(if $(SOURCES),$(PY) -m nbstripout --verify $(SOURCES))
	$(PY) -m experiments params >/dev/null
	$(PY) -m dvc pull --quiet
	$(PY) -m pytest -n logical --dist loadfile
	$(PY) -m pytest --quiet --doctest-modules medsec
	$(if $(EXECUTED),$(REPLAY))

# Replayed notebooks write to a folder that is thrown away, and are compared with the committed outputs and tables.
define REPLAY
@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && unset MPLBACKEND && \
MEDSEC_OUT="$$scratch" MEDSEC_CELLS="$$scratch/cells" IPYTHONDIR="$$scratch/ipython" PYTHONHASHSEED=0 PYTHONUTF8=1 TQDM_DISABLE=1 \
MEDSEC_LIVE=0 && export MEDSEC_OUT MEDSEC_CELLS IPYTHONDIR PYTHONHASHSEED PYTHONUTF8 TQDM_DISABLE MEDSEC_LIVE && \
$(PY) -m experiments cells --cohort phantom && \
$(PY) -m pytest --nbval --nbval-current-env --nbval-cell-timeout=3600 \
  --nbval-sanitize-with tests/nbval_sanitize.cfg $(EXECUTED)
endef

test-deployment: $(READY) ## Flower's own servers and nodes over loopback, one killed, with the simulation (minutes)
	$(PY) -m uv pip install --python $(PY) -e ".[dev,flower-simulation]" -c requirements.lock
	$(PY) -m dvc pull --quiet
	$(PY) -m pytest -m deployment tests/test_deployment.py

fuzz: $(READY) ## thousands of generated bad inputs, and twenty killed runs (about half an hour)
	$(PY) -m dvc pull --quiet
	$(PY) -m pytest -m "fuzz or kills" --hypothesis-profile=fuzz

# torchattacks and byzpy ask for exact old versions of these: all libraries are measured on the same new ones.
bench: $(READY) ## measure our rules, attacks and rounds beside those of other libraries, in an environment of its own
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	printf 'numpy>=2.3\nrequests>=2.31\ntorch>=2.6\ntorchvision>=0.21\n' > .venv-bench/overrides.txt
	$(PY) -m uv pip install --python .venv-bench/bin/python -e ".[evasion]" -r benchmarks/requirements.txt \
	  --override .venv-bench/overrides.txt
	$(PY) -m dvc pull --quiet
	for each in aggregators evasion inversion others; do .venv-bench/bin/python benchmarks/$$each.py || exit 1; done

record: $(READY) ## make or resume the records of a cohort (hours; PLAN=1 only says what it would do)
	$(PY) -m experiments record 01_backdoor_fedgan --cohort $(COHORT) $(if $(PLAN),--plan)
	$(PY) -m experiments record 02_feddetect --cohort $(COHORT) $(if $(PLAN),--plan)
	$(PY) -m experiments record 03_gia_defense --cohort $(COHORT) $(if $(PLAN),--plan)
	$(PY) -m experiments record 04_adversarial_pruning_defense --cohort $(COHORT) $(if $(PLAN),--plan)
	$(PY) -m experiments record 05_threat_matrix --cohort $(COHORT) $(if $(PLAN),--plan)

lab: $(READY) ## open the notebooks in JupyterLab, with sliders
	MEDSEC_LIVE=1 $(PY) -c "import medsec; from jupyterlab.labapp import main; main()" .

book: $(READY) ## build this companion as a web site from the executed notebooks: _build/book/html
	$(PY) book/build.py

slides: $(READY) ## the slides of docs/slides.md, with the figures of the executed notebooks: _build/slides.pdf
	$(PY) book/slides.py

lock: $(BOOT) ## pin versions anew after a change of pyproject.toml (UPGRADE=1: the newest of everything)
	$(PY) -m uv pip compile --universal --python-version 3.11 --extra dev --extra flower-simulation pyproject.toml -o requirements.lock \
	  --no-emit-index-url --no-header --no-annotate --quiet $(if $(UPGRADE),--upgrade)

clean: ## remove scratch folders and caches (.venv, data and results stay)
	rm -rf .medsec-tmp-* .pytest_cache .ruff_cache .hypothesis _build build dist dvc_plots
	find . -name .venv -prune -o -name .git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune \
	  -exec rm -rf {} +
