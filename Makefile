# Everything here prepares its own environment in .venv; a fresh machine needs only Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
# On a small or shared machine more threads than free cores can be 25 times slower: OMP_NUM_THREADS=8 make run
OMP_NUM_THREADS ?= 1
export OMP_NUM_THREADS
# processes of `make test`
PYTEST_WORKERS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
export PATH := $(abspath $(VENV))/bin:$(PATH)

# named by the content of what it depends on: new pins mean a new installation, a new date does not
READY := $(VENV)/.ready-$(firstword $(shell cat settings.ini setup.py | cksum))
OUT = out/digits
TABLES = all
DATASET = digits
# the notebook's own prints and progress bars, nothing of papermill's
SHOW = --no-progress-bar --log-level ERROR --stdout-file - --stderr-file -
.DEFAULT_GOAL = help
.PHONY: help setup run baselines learning study paper test lint notebooks pytest wheel sync docs train-digits clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: $(READY) ## install into .venv; skipped while settings.ini and setup.py are unchanged

# k-diffusion, for the tests, without what only its training needs: that would take numpy back below 2
$(READY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(\
	  f"s4s_nb needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), a few minutes the first time ..."
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps k-diffusion==0.1.1.post1
	@touch $@

run: $(READY) ## learn solvers for the digits model, print them beside their parents
	@mkdir -p $(OUT)
	@papermill nbs/experiments.ipynb $(OUT)/experiments.ipynb -p dataset digits -p quick True \
	  -p methods s4s,ld3,s4s_alt -p out $(OUT) \
	  $(SHOW) 2> $(OUT)/run.log || { tail -n 5 $(OUT)/run.log; exit 1; }
	@cat $(OUT)/table.md

# not the product of all grids: without -p schedules each method runs on those it was published with
baselines: $(READY) ## DPM-Solver-v3, BNS and AMED-Plugin on the digits, into results/digits/baselines
	@mkdir -p out/baselines
	@papermill nbs/experiments.ipynb out/baselines/experiments.ipynb -p dataset digits -p methods dpm_solver_v3,bns,amed \
	  -p solvers ipndm -p nfes 4,6,8 -p train_seeds 0 -p n_samples 2000 -p ranges 1 -p out results/digits/baselines \
	  $(SHOW) 2> out/baselines/run.log || { tail -n 5 out/baselines/run.log; exit 1; }
	@cat results/digits/baselines/table.md

learning: $(READY) ## every learner on the digits, three training seeds, into results/digits/learning; says how long it took
	@mkdir -p out/learning
	@papermill nbs/lab/learning_study.ipynb out/learning/learning_study.ipynb $(SHOW) 2> out/learning/run.log \
	  || { tail -n 5 out/learning/run.log; exit 1; }
	@cat results/digits/learning/table.md

# the executed notebook of all tables lies beside them
study: $(READY) ## every table and figure of the paper on the digits, into results/digits; or TABLES=table5,figure4
	@mkdir -p out/study
	@papermill nbs/ablations.ipynb $(if $(filter all,$(TABLES)),results/digits,out/study)/ablations.ipynb -p tables $(TABLES) $(SHOW) 2>> out/study/run.log \
	  || { tail -n 5 out/study/run.log; exit 1; }

# on the digits the main experiment is the quick one of `make run`
paper: $(READY) ## tables, figures and claims of the paper for DATASET=digits, into results/$(DATASET)
	@mkdir -p results/$(DATASET) out/paper
	@for page in experiments ablations tables; do \
	  case $$page-$(DATASET) in experiments-digits) more="-p quick True -p methods s4s,ld3,s4s_alt";; *) more=;; esac; \
	  papermill nbs/$$page.ipynb results/$(DATASET)/$$page.ipynb -p dataset $(DATASET) $$more $(SHOW) 2>> out/paper/run.log \
	    || { tail -n 5 out/paper/run.log; exit 1; }; \
	done

test: lint pytest ## all checks, one process per core (or PYTEST_WORKERS=2)

lint: $(READY) ## style of modules, notebooks and tests
	ruff check .

notebooks: $(READY) ## nbdev_test: every page with the code of its own cells; `make test` runs them against the modules
	nbdev_test --timing --n_workers $(PYTEST_WORKERS)

pytest: $(READY) ## repository, notebooks, golden data; with COVERAGE=90 also that as many per cent of the lines ran
	python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(if $(COVERAGE),--cov --cov-fail-under=$(COVERAGE))

wheel: $(READY) ## build the package, install it alone in a clean environment, learn and sample with it
	rm -rf out/wheel build && mkdir -p out/wheel
	pip wheel --quiet --no-deps --wheel-dir out/wheel .
	$(PYTHON) -m venv out/wheel/env
	out/wheel/env/bin/python -m pip install --quiet --disable-pip-version-check out/wheel/*.whl
	cd out/wheel && env -u PYTHONPATH env/bin/python ../../tests/clean_install.py

sync: $(READY) ## after an edit: clean, export, run the library notebooks (or NB=03_solver), README.md
	nbdev_clean
	nbdev_export
	python docs/execute.py $(NB)
	nbdev_clean
	python docs/readme.py

docs: $(READY) ## the site, in docs/_build/html
	python docs/preprocess.py
	sphinx-build -q -W --keep-going -c docs -d docs/_build/doctrees docs/_src docs/_build/html
	@echo "The site is docs/_build/html/index.html"

train-digits: $(READY) ## train the embedded digits models from scratch, into out/train_digits
	@mkdir -p out/train_digits
	@papermill nbs/models/train_digits.ipynb out/train_digits/train_digits.ipynb $(SHOW)

clean: ## remove what these commands wrote; .venv and the cache of teacher pairs stay
	rm -rf out/* build dist *.egg-info docs/_src docs/_build _docs _proc .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
