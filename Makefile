# make demo | make test | make test-slow | make lint | make clean
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
export JAX_PLATFORMS ?= cpu
# What is compiled here is kept for all checkouts.
export JAX_COMPILATION_CACHE_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME:%=%/.cache),$(CURDIR)/.cache)/jaxgen/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.02

.PHONY: install demo test test-slow test-numeric lint compilers compile-check compile-models clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxgen needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade-strategy only-if-needed -e '.[demo,test]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python scripts/demo.py --workdir runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" tests

# Whole systems, trained and measured at smoke size.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow tests

# The models, samplers and checkpoints only: for another Python or jax.
test-numeric: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "numeric and not slow" tests

lint: $(STAMP)
	$(BIN)/pip install --quiet ruff
	$(BIN)/ruff check jaxgen kernels_pallas configs scripts tests

# Compiles every kernel for TPUs and Hopper GPUs that are not attached. The compilers (2 GB) go to .cache/compilers.
compilers: $(STAMP)
	$(BIN)/python scripts/compile_kernels.py --install

compile-check: compilers
	$(BIN)/python scripts/compile_kernels.py

# The same for a bfloat16 VAR, and for every config's training steps and sampler at smoke size, on a TPU.
ON_TPU = PYTHONPATH="$$(echo .cache/compilers/tpu-*)" TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_WORKER_ID=0 \
  TPU_ACCELERATOR_TYPE=v5litepod-4 ALLOW_MULTIPLE_LIBTPU_LOAD=1
compile-models: compilers
	$(ON_TPU) $(BIN)/python scripts/benchmark.py var --depth 2 --batch 4 --dtype bfloat16 --train --topology v5e:2x2 \
	  --set data.image_size=64 tokenizer.patch_nums=1,2,3,4
	$(ON_TPU) $(BIN)/python scripts/benchmark.py recipes --topology v5e:2x2

clean:
	rm -rf $(VENV) .venv312 .cache runs
