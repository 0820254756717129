# make demo: the first look. make test: everything that needs no GPU. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: demo test test-matrix test-gpu bench sanitize lint clean

demo: $(STAMP)
	$(BIN)/foveal demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-matrix: $(STAMP)  ## every host with every method under every condition
	$(BIN)/python -m pytest tests/plugins -m matrix

test-gpu:  ## in the environment of $(PYTHON), which needs torch for the GPU, triton, safetensors and pytest
	PYTHONPATH=. $(PYTHON) -m pytest tests/kernels/test_block_sparse_gpu.py tests/kernels/test_hopper_gpu.py tests/kernels/test_gated_linear_gpu.py \
		tests/kernels/test_selection_gpu.py tests/kernels/test_token_mixing_gpu.py tests/kernels/test_query_key_gpu.py tests/kernels/test_card_laws_gpu.py tests/pipelines/test_replay_gpu.py -m gpu

bench:  ## on an NVIDIA GPU; writes benchmarks/results
	PYTHONPATH=. $(PYTHON) -m foveal.pipelines.bench kernels
	PYTHONPATH=. $(PYTHON) -m foveal.pipelines.bench layers
	PYTHONPATH=. $(PYTHON) -m foveal.pipelines.bench vision
	PYTHONPATH=. $(PYTHON) -m foveal.pipelines.bench backbones
	PYTHONPATH=. $(PYTHON) benchmarks/static_methods.py

sanitize:  ## compute-sanitizer on 50 small calls of every kernel; writes benchmarks/results/sanitizer.json
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=. $(PYTHON) benchmarks/sanitize.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p foveal

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
