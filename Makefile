# `make train` runs the main job, `make test` the tests: each sets up what it needs, in .venv.
# PYTHON chooses the interpreter (3.12 or newer); where torch and Megatron are installed already, as in a
# container, `make test VENV=` uses that environment as it is.

PYTHON ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 -V >/dev/null 2>&1 && echo python3.12 || echo python3)
VENV ?= .venv
SETUP := $(if $(VENV),$(VENV)/.complete,)
RUN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
BIN := $(if $(VENV),$(VENV)/bin/)
# TransformerEngine's Python code, which only some tests see: tests/distributed/with_te.
WITH_TE := $(if $(VENV),$(VENV)/transformer-engine/.complete,)
# The versions of Megatron beside the installed one, and what runs on each: docs/versions.md.
VERSIONS ?= $(patsubst tests/versions/%.txt,%,$(wildcard tests/versions/*.txt))
OLDEST = $(if $(VENV),$(VENV)/megatron/$(firstword $(sort $(VERSIONS)))/.complete,)
VERSION_TESTS := $(addprefix tests/distributed/test_,$(addsuffix .py,versions register patches parity \
  checkpoint precision from_adam update_rms fsdp offload fused_step cuda_graph module))
# The frameworks whose own code is tested, each in a folder of its own: docs/frameworks.md.
FRAMEWORKS ?= $(patsubst tests/frameworks/%.txt,%,$(wildcard tests/frameworks/*.txt))
CPP := megatron_adams/kernels/source/* benchmarks/*.cu benchmarks/*.cpp tests/*/*.h

# One test more at a time than there are cores (tests/conftest.py), as many tests wait. More than four hold
# up each other: each test may start processes.
# A file's tests stay together, as they share runs.
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: help setup dist train test test-all test-versions test-frameworks lint sweep quality rl nlu ssl bench image docs clean
help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(SETUP) $(WITH_TE) $(OLDEST)  ## create the environment alone

$(VENV)/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "$$($(PYTHON) --version) at $$(command -v $(PYTHON)): megatron-adams needs Python 3.12 or newer;" \
	    "install it, or name one with make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV) (torch is 3 GB: minutes on the first run)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Another version of Megatron, as tests/versions names it: in front of the installed one.
$(VENV)/megatron/%/.complete: tests/versions/%.txt | $(SETUP)
	rm -rf $(@D)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --target $(@D) --requirement $<
	@touch $@

# DeepSpeed is built from its sources, with torch at hand; nothing of it is compiled.
$(VENV)/frameworks/%/.complete: tests/frameworks/%.txt | $(SETUP)
	rm -rf $(@D)
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --no-build-isolation --target $(@D) --requirement $<
	@touch $@

$(VENV)/transformer-engine/.complete: tests/distributed/with_te/requirements.txt | $(SETUP)
	rm -rf $(@D)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --no-deps --target $(@D) --requirement $<
	@touch $@

dist: $(SETUP)  ## build the wheel and the sdist into dist/, and check them
	$(RUN) -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[release]'
	rm -rf dist build
	$(RUN) -m build --no-isolation --outdir dist
	PATH="$(abspath $(BIN)):$$PATH" .ci/check-dist dist

train: $(SETUP)  ## train a small GPT with AdamS and with AdamW, and compare them
	$(RUN) examples/pretrain_gpt/train.py $(ARGS)

sweep: $(SETUP)  ## the learning-rate sweep behind the recipe's defaults
	$(RUN) examples/pretrain_gpt/sweep.py $(ARGS)

quality: $(SETUP)  ## AdamS beside AdamW at two batch sizes; ARGS="--parts 23" is the whole study
	OMP_NUM_THREADS=1 $(RUN) examples/quality/cpu_study.py $(or $(ARGS),--parts 2)

rl: $(SETUP)  ## post-train a small Llama by GRPO with AdamS and with AdamW: the short study
	$(RUN) examples/rl_countdown/rl_study.py --short $(ARGS)

nlu: $(SETUP)  ## encoder teachers, students and their fine-tuning, small; ARGS=--quick shows the steps
	$(RUN) examples/nlu_teacher/pipeline.py $(ARGS)

ssl: $(SETUP)  ## intents and slots with an unlabelled pool, small; ARGS=--quick or --full
	$(RUN) examples/nlu_teacher/pipeline.py --steps examples/nlu_ssl/pipeline.toml $(ARGS)

bench: $(SETUP)  ## time AdamS's step against other optimizers and the memory stream
	$(RUN) benchmarks/step.py $(ARGS)

test: lint $(WITH_TE) $(OLDEST)  ## lint, type-check and run the tests
	$(RUN) -m pytest $(PARALLEL) $(ARGS)

test-all: lint $(WITH_TE) $(OLDEST)  ## the same with the cases that others cover in part
	$(RUN) -m pytest $(PARALLEL) --full $(ARGS)

# MEGATRON names a checkout of Megatron-LM, which is tested in the place of VERSIONS, also where its
# version is not supported.
test-versions: $(if $(MEGATRON),,$(VERSIONS:%=$(VENV)/megatron/%/.complete))  ## the matrix of Megatron's versions
	@for tree in $(or $(MEGATRON),$(VERSIONS:%=$(VENV)/megatron/%)); do \
	  echo "Megatron of $$tree"; \
	  PYTHONPATH=$$tree MEGATRON_ADAMS_TEST_ANY_MEGATRON=$(MEGATRON) \
	    $(RUN) -m pytest $(PARALLEL) $(VERSION_TESTS) $(ARGS) || exit 1; \
	done

test-frameworks: $(FRAMEWORKS:%=$(VENV)/frameworks/%/.complete) $(VERSIONS:%=$(VENV)/megatron/%/.complete)  ## AdamS in DeepSpeed, verl and others
	$(RUN) -m pytest $(PARALLEL) tests/frameworks $(ARGS)

lint: $(SETUP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(BIN)clang-format --dry-run -Werror $(wildcard $(CPP))
	$(BIN)hadolint docker/*.Dockerfile
	$(BIN)shellcheck --external-sources $$(git ls-files '*.sh' '*.sbatch' .ci/run .ci/check-dist)
	$(RUN) -m yamllint --strict .github .pre-commit-config.yaml .yamllint.yaml examples/jobs

image:  ## build the container image for CPUs; ARGS=gpu builds the one for GPUs
	docker/build.sh $(or $(ARGS),cpu)

docs: $(SETUP)  ## build the documentation's site into build/docs; a broken link is an error
	$(RUN) -m zensical build --strict --clean
	@echo "Open build/docs/index.html"

clean:  ## remove the environment, runs and caches
	rm -rf .venv runs build dist .cache *.egg-info .pytest_cache .ruff_cache .mypy_cache
