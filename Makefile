# Every target makes .venv from the pinned constraints when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test quality style benchmarks evidence clean

demo: $(INSTALLED)
	$(BIN)/python examples/pretrain.py --output-dir runs/demo --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto tests

quality: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

style: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The CPU set, on one core: other processes on the machine disturb it little, but they do.
benchmarks: $(INSTALLED)
	for size in small mid; do \
		$(BIN)/python benchmarks/train_step.py --size $$size && \
		$(BIN)/python benchmarks/generate.py --size $$size && \
		$(BIN)/python benchmarks/experts.py --size $$size || exit 1; \
	done

# The paper's experiments at the scale of two CPU cores: hours. May be stopped and started at any time. The report is
# written in any case, and says what is missing.
evidence: $(INSTALLED)
	$(BIN)/python -m benchmarks.paper.run --scale cpu; status=$$?; \
	$(BIN)/python -m benchmarks.paper.report && exit $$status

clean:
	rm -rf $(VENV)

# torch comes first and by its exact pin: a range would fetch the newest build with all of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev]'
	touch $@
