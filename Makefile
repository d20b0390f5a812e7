# Set-up, tests, the main job. Every target that needs the environment makes it first; second runs reuse everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)
BUILD_TOOLS := scikit-build-core pybind11 cmake ninja
# libgomp spins while it waits; beside any other program on the same cores that costs up to 20x (measured).
export OMP_WAIT_POLICY ?= passive
QUIET := -q --disable-pip-version-check --no-input

.PHONY: setup bench peers test lint clean native-test asan tsan

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUIET) -c constraints.txt torch==2.13.0 $(BUILD_TOOLS) ruff
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install $(QUIET) --no-build-isolation -c constraints.txt -e '.[bench,test,triton]'
	touch $@

bench: setup
	$(BIN)/python -m bench run

# Installs other projects' packages into .peers/, a gigabyte, then takes 35 to 40 minutes.
peers: setup
	$(BIN)/python -m bench peers --install all
	$(BIN)/python -m bench peers

# The second run has Triton's kernels interpreted, on the CPU; a process either interprets or compiles.
test: setup
	$(BIN)/python -m pytest -q
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests -k triton

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The kernels without Python: a standalone binary, on every ISA level that this CPU runs.
native-test asan tsan: setup
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DMOE_KERNELS_CPP_TEST=ON \
	  -DMOE_KERNELS_SANITIZER=$(if $(filter asan,$@),address,$(if $(filter tsan,$@),thread,)) > /dev/null
	$(BIN)/cmake --build build/$@
	build/$@/moe_native_test

clean:
	rm -rf $(VENV) build report .pytest_cache .ruff_cache .hypothesis .benchmarks moe_kernels/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
