# make demo: fresh machine → venv → a small archive is made, segmented and looked at, offline.
# make train-demo, make train-nuclei: the weights shipped as demo and nuclei, as they were trained.
# make test: fresh machine → venv → lint, types, tests.
# make chaos: two hundred faults against one run after another, an hour and more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

NUCLEI ?= ../shared/data/nuclei
RUNS ?= runs

# What all share but for the learning rate: a body of half the width, AdamW on a cosine, an average of the weights.
RECIPE = --model R18-half-FPN --batch-size 16 --precision bf16 --save-half \
	--workers 2 --cpus-per-worker 1 --loader-processes 1 --checkpoint-every 100 \
	--optimiser.kind adamw --optimiser.learning-rate $(1) --optimiser.weight-decay 0.05 \
	--optimiser.schedule cosine --optimiser.warmup-steps 50 --optimiser.clip-norm 5 --optimiser.ema 0.995 \
	--losses.rpn-pre-nms 500 --losses.rpn-post-nms 500 --losses.box-samples 128

.PHONY: demo train-demo train-nuclei test test-all chaos lint

$(VENV)/ready: pyproject.toml constraints.txt model/kernels/winograd.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/maskline demo

# make train-nuclei TRAIN="--peer torchvision" RUNS=peer: torchvision's network and losses in the same loop.
train-nuclei: $(VENV)/ready
	$(BIN)/maskline train --output $(RUNS)/nuclei $(call RECIPE,1e-3) --min-size 512 --max-size 1024 --max-detections 300 \
		--train-annotations $(NUCLEI)/instances_train.json --train-images $(NUCLEI)/images \
		--val-annotations $(NUCLEI)/instances_val.json --val-images $(NUCLEI)/images \
		--epochs 26 --evaluate-every 13 \
		--augment.quarter-turns --augment.scales 0.6 1.6 --augment.crop 256 \
		--augment.brightness 0.3 --augment.contrast 0.3 --augment.saturation 0.3 --augment.hue 0.1 $(TRAIN)

SCENES := --train-annotations $(RUNS)/scenes/train/instances.json --train-images $(RUNS)/scenes/train \
	--val-annotations $(RUNS)/scenes/val/instances.json --val-images $(RUNS)/scenes/val

# Begun on small images, ended on larger ones.
train-demo: $(VENV)/ready $(RUNS)/scenes/train $(RUNS)/scenes/val
	$(BIN)/maskline train --output $(RUNS)/demo-begun $(call RECIPE,1e-3) $(SCENES) \
		--epochs 4 --evaluate-every 2 --augment.crop 320 --augment.scales 0.8 1.2 $(TRAIN)
	$(BIN)/maskline train --output $(RUNS)/demo --init $(RUNS)/demo-begun/best.safetensors $(call RECIPE,6e-4) $(SCENES) \
		--epochs 4 --evaluate-every 2 --augment.crop 320 --augment.scales 0.7 1.2 --min-size 400 --max-size 667 $(TRAIN)

$(RUNS)/scenes/train:
	$(BIN)/maskline draw $@ --num-images 3000 --seed 1001

$(RUNS)/scenes/val:
	$(BIN)/maskline draw $@ --num-images 100 --seed 1002

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Two files of tests at a time, begun in their order, which has the longest first.
test: lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-all: lint
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,fuzz]"
	$(BIN)/pytest -m "not gpu"

chaos: $(VENV)/ready
	$(BIN)/python -m tests.chaos.run $(or $(FAULTS),200)
