# make train   everything from nothing: environment, model, the quickstart run and its report
# make test    the same environment with the test extra, and the tests
# make test-deepspeed   training under DeepSpeed's ZeRO-2 and ZeRO-3, in an environment on top of that one
# make test-vllm   rollouts with the real vLLM, its CPU build, in an environment of its own
# make test-oldest   the oldest torch, triton and transformers allowed, in an environment of its own
#
# PYTHON=python3.12 picks another interpreter, VENV=path another environment, ARGS="--max_steps 4" adds arguments.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
INPUTS := setup.py pyproject.toml constraints.txt

.PHONY: train test test-deepspeed test-vllm can-test-vllm test-oldest can-test-oldest sanitize can-sanitize compile-report lint bench gpu model clean
.DELETE_ON_ERROR:

train: model
	$(BIN)/atesd train quickstart $(ARGS)

# Fetched and converted by a process of its own, once for this user.
model: $(VENV)/.installed
	$(BIN)/python -m atesd.models.smollm

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests --numprocesses auto --dist worksteal $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The kernels' GPU suite without a GPU: what Triton's compiler produces is executed on the CPU, and an out-of-bounds
# access, a race between programs or a read of unwritten memory fails its test. Python 3.12, in an environment of its own.
# The first Python 3.12 that runs, on the path (where pyenv's shims may only say so) or among pyenv's.
SANITIZE_PYTHON ?= $(shell for python in python3.12 $$(ls -d "$$(pyenv root 2>/dev/null)"/versions/3.12*/bin/python3.12 \
	2>/dev/null); do $$python -c "import ensurepip" 2>/dev/null && echo $$python && break; done)
SANITIZE_VENV ?= .venv-sanitize

sanitize: $(SANITIZE_VENV)/.installed
	$(SANITIZE_VENV)/bin/python -m ttsem.sanitize pytest tests/kernels/test_triton_gpu.py --noconftest -q $(ARGS)

can-sanitize can-test-oldest:
	@test -n "$(SANITIZE_PYTHON)" || { echo "make $(@:can-%=%) needs Python 3.12 and found none: install one" \
		"(pyenv install 3.12, apt install python3.12-venv) or name one, SANITIZE_PYTHON=/path/to/python3.12"; exit 1; } >&2

$(SANITIZE_VENV)/.installed: requirements-sanitize.txt | can-sanitize
	$(SANITIZE_PYTHON) -m venv $(SANITIZE_VENV)
	$(SANITIZE_VENV)/bin/python -m pip install --quiet --requirement requirements-sanitize.txt
	@touch $@

# The oldest versions allowed, with Python 3.12: training, the losses' tests in Triton's interpreter, all that the GPU suite
# would launch compiled for sm_90, and the GPU's benchmarks at toy sizes. atesd is not installed there: it is on the path.
OLDEST_VENV ?= .venv-oldest
OLDEST := $(OLDEST_VENV)/bin/python
OLDEST_TESTS := tests/test_trainer.py tests/models/test_varlen.py tests/kernels/test_triton_interpreted.py \
	tests/kernels/test_contract.py tests/kernels/test_exactness.py tests/kernels/test_autograd.py \
	tests/kernels/test_planning.py

test-oldest: $(OLDEST_VENV)/.installed
	$(OLDEST) -m pytest $(OLDEST_TESTS) --numprocesses auto --dist worksteal $(ARGS)
	$(OLDEST) -m pytest -p tests.kernels.compiled_only --noconftest tests/kernels/test_triton_gpu.py -q
	$(OLDEST) -m bench.gpu.warm --compile-only headline
	$(OLDEST) -m bench.gpu --dry --out $(OLDEST_VENV)/gpu-results

$(OLDEST_VENV)/.installed: requirements-oldest.txt | can-test-oldest
	$(SANITIZE_PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST) -m pip install --quiet --requirement requirements-oldest.txt
	@touch $@

# DeepSpeed stays out of the other tests' environment, for accelerate and trl import it wherever they see it: this one has
# it alone and looks into the other for the rest. It is published as sources whose set-up asks for the torch it will run
# with; its operators are compiled when they are first used.
DEEPSPEED_VENV ?= .venv-deepspeed

test-deepspeed: $(DEEPSPEED_VENV)/.installed
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(DEEPSPEED_VENV)/bin/python -m pytest tests/parallel/test_processes.py -k ZeRO $(ARGS)

$(DEEPSPEED_VENV)/.installed: $(INPUTS) | $(VENV)/.installed-test
	$(BIN)/python -m venv $(DEEPSPEED_VENV)
	$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" \
		> "$$($(DEEPSPEED_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])')/beneath.pth"
	$(DEEPSPEED_VENV)/bin/python -m pip install --quiet "setuptools>=77" wheel
	DS_BUILD_OPS=0 $(DEEPSPEED_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
		"deepspeed>=0.19.8,<0.20"
	@touch $@

# vLLM pins torch and transformers, hence an environment of its own. Its CPU build asks for three packages that exist for
# pictures and sound and do not load beside that torch: vLLM does without them.
# One thread each for trainer and server: vLLM's threads wait for each other in a loop, and on a machine with other work
# that is most of what they do.
VLLM_VENV ?= .venv-vllm

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m atesd.models.smollm
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VLLM_VENV)/bin/python -m pytest tests/vllm_rollouts $(ARGS)

can-test-vllm:
	@! grep -q '^flags' /proc/cpuinfo || grep -qw avx2 /proc/cpuinfo || { echo "make test-vllm needs a processor with" \
		"AVX2: vLLM's CPU build has no code for this one"; exit 1; } >&2

# Without --no-compile pip compiles ten thousand files, of which the tests import a few.
$(VLLM_VENV)/.installed: requirements-vllm.txt setup.py | can-test-vllm
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-compile --requirement requirements-vllm.txt --editable .
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Compiles every kernel for four GPUs this machine need not have, and fails on spills and slow instructions.
compile-report: $(VENV)/.installed-test
	$(BIN)/python -m atesd_kernels.tools.compile_report --check

# What this GPU does, in thirteen minutes. ARGS="--minutes 6 --stages 1-4" for a part, "--dry" without a GPU.
gpu: $(VENV)/.installed-bench-gpu,test
	$(BIN)/python -m bench.gpu $(ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/python -m pytest bench $(ARGS)

# The stamps make a second `make` a matter of seconds: pip runs again only when what is installed has changed.
$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-%: $(INPUTS) | $(BIN)/python
	$(INSTALL) ".[$*]"
	@touch $@ $(VENV)/.installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(SANITIZE_VENV) $(OLDEST_VENV) $(DEEPSPEED_VENV) $(VLLM_VENV) build *.egg-info .pytest_cache .ruff_cache
