# Set-up, tests, the main job. Every target that needs the environment makes it first; second runs reuse everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CXX_FILES = $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)
BUILD_TOOLS := scikit-build-core pybind11 cmake ninja
# libgomp spins while it waits; beside any other program on the same cores that costs up to 20x (measured).
export OMP_WAIT_POLICY ?= passive
unexport MAKEFLAGS  # ninja, in tests too, takes make's job server for its own and fails
QUIET := -q --disable-pip-version-check --no-input

.PHONY: setup bench peers test test-host test-triton test-cuda test-cuda-asan fibers cuda lint docs clean native-test asan tsan

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt CMakeLists.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUIET) -c constraints.txt torch==2.13.0 $(BUILD_TOOLS) ruff clang-format
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install $(QUIET) --no-build-isolation -c constraints.txt -e '.[bench,test,triton,ecosystem]'
	touch $@

bench: setup
	$(BIN)/python -m bench run

# Installs other projects' packages into .peers/, a gigabyte, then takes 35 to 40 minutes.
peers: setup
	$(BIN)/python -m bench peers --install all
	$(BIN)/python -m bench peers

# Two runs at a time, each one thread for the most part: with three the tests that find planted slowdowns see too much noise.
test: setup
	$(MAKE) --output-sync=target -j2 test-host test-triton test-cuda test-cuda-asan native-test

test-host: setup
	$(BIN)/python -m pytest -q

# Triton's kernels interpreted, on the CPU; a process either interprets or compiles.
test-triton: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests -k triton

# The CUDA sources on the CPU, a fiber per thread: kernels alone in three orders of the threads, then the backend: all its tests with plain
# products, the fused layer's and sums longer than a ring (with every engine) where copies and products land as late as they may.
# SANITIZER=address: under the address and undefined-behaviour sanitizers, ten times as long.
LATE := tests/product/test_moe_mlp.py tests/product/test_cuda.py -k 'cuda and not float32 and not fp32 and not asked_for'
test-cuda: fibers
	$(FIBERS)/cuda_test
	$(ON_FIBERS) MOE_FIBER_ENGINE=simt $(BIN)/python -m pytest -q tests -k cuda
	$(ON_FIBERS) MOE_FIBER_ORDER=reverse MOE_FIBER_ENGINE=sm80 $(BIN)/python -m pytest -q $(LATE)
	$(ON_FIBERS) MOE_FIBER_ORDER=shuffled MOE_FIBER_ENGINE=sm90 $(BIN)/python -m pytest -q $(LATE)

# Of that, what CI runs under them: the kernels alone, whose buffers end at the byte, in one order, which moves no address.
test-cuda-asan: SANITIZER := address
test-cuda-asan: setup
	$(CONFIGURE_FIBERS)
	$(BIN)/cmake --build $(FIBERS) --target cuda_test
	MOE_FIBER_ORDER=forward $(FIBERS)/cuda_test

FIBERS = build/$(if $(SANITIZER),$(SANITIZER)-,)fibers
ON_FIBERS = MOE_KERNELS_FIBERS=$$(echo $(abspath $(FIBERS))/_cuda_fibers*.so) $(if $(SANITIZER),ASAN_OPTIONS=detect_leaks=0 \
  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)")
CONFIGURE_FIBERS = $(BIN)/cmake -S . -B $(FIBERS) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DMOE_KERNELS_FIBERS=ON \
  -DMOE_KERNELS_SANITIZER=$(SANITIZER) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) > /dev/null
fibers: setup
	$(CONFIGURE_FIBERS)
	$(BIN)/cmake --build $(FIBERS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# The site, build/site: strict, so a dead link or an unknown name is an error; nothing in it comes from elsewhere.
docs: setup
	$(BIN)/python -m pip install $(QUIET) -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# The kernels without Python: a standalone binary, on every ISA level that this CPU runs.
native-test asan tsan: setup
	$(BIN)/cmake -S . -B build/$@ -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DMOE_KERNELS_CPP_TEST=ON \
	  -DMOE_KERNELS_SANITIZER=$(if $(filter asan,$@),address,$(if $(filter tsan,$@),thread,)) > /dev/null
	$(BIN)/cmake --build build/$@
	build/$@/moe_native_test

# The CUDA backend, in the environment of `setup`: needs nvcc. The headers of nvidia-cutlass are all that is used of it.
cuda: setup
	$(BIN)/python -m pip install $(QUIET) --no-deps -c constraints.txt nvidia-cutlass
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install $(QUIET) --no-build-isolation --no-deps -c constraints.txt \
	  -C cmake.define.MOE_KERNELS_CUDA=ON -e .

clean:
	rm -rf $(VENV) build report .bench-revisions .pytest_cache .ruff_cache .hypothesis .benchmarks moe_kernels/_C*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
