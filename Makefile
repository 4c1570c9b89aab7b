SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup constraints demo teacher dump student pipeline test lint bench clean

PYTHON ?= python3
DATASET ?= digits
TEACHER ?= cnn
STUDENT ?= mlp
TEMPERATURE ?= 4
ALPHA ?= 0.9
EPOCHS ?= 5
# Of the teacher alone: what it learns from augmented samples, students learn from its answers to plain ones.
AUGMENT ?= $(if $(filter digits mnist,$(DATASET)),affine,$(if $(filter cifar10 cifar100,$(DATASET)),crop-flip,none))
DATA ?= data
OUT ?= runs/$(DATASET)
ARGS ?=

BIN := .venv/bin
KDCACHE := $(BIN)/kdcache
READY := .venv/.ready
# Settings that change a result are part of its folder's name, so a stage never passes for another one.
TEACHER_RUN := $(OUT)/teacher-$(TEACHER)-$(EPOCHS)-$(AUGMENT)
CACHE := $(OUT)/$(TEACHER)-$(EPOCHS)-$(AUGMENT).zarr
# Beside the cache, because other Zarr readers warn of files in it that are no part of it.
DUMPED := $(CACHE).dumped
ALONE_RUN := $(OUT)/alone-$(STUDENT)-$(EPOCHS)
STUDENT_RUN := $(OUT)/student-$(STUDENT)-$(EPOCHS)-$(TEACHER)-$(AUGMENT)-T$(TEMPERATURE)-a$(ALPHA)
SOURCE := --data-root $(DATA)

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  DATASET=$(DATASET) TEACHER=$(TEACHER) STUDENT=$(STUDENT) TEMPERATURE=$(TEMPERATURE) ALPHA=$(ALPHA)"
	@echo "  EPOCHS=$(EPOCHS) AUGMENT=$(AUGMENT) DATA=$(DATA) OUT=$(OUT)"

setup: $(READY) ## make .venv with kdcache and all it needs

$(READY): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint .ci/constraints.txt --editable '.[dev]'
	@touch $@

constraints: $(READY) ## renew the tested set of dependencies
	$(BIN)/uv pip compile --quiet --universal --upgrade --no-header --no-annotate --no-emit-index-url \
		--all-extras --output-file .ci/constraints.txt pyproject.toml

demo: ## the whole pipeline on the embedded digits
	@$(MAKE) --no-print-directory pipeline DATASET=digits EPOCHS=100

teacher: $(TEACHER_RUN)/result.json ## train a teacher
dump: $(DUMPED) ## run the teacher once, keep its logits
student: $(STUDENT_RUN)/result.json ## train a student from the cache

pipeline: $(TEACHER_RUN)/result.json $(ALONE_RUN)/result.json $(STUDENT_RUN)/result.json ## all three, a table and a page
	@echo
	@$(KDCACHE) compare $(TEACHER_RUN) $(ALONE_RUN) $(STUDENT_RUN)
	$(KDCACHE) report $(TEACHER_RUN) $(ALONE_RUN) $(STUDENT_RUN) $(SOURCE) --out $(OUT)/report.html

# A run that was stopped is continued.
resume = $(if $(wildcard $(1)/config.json),--resume)

$(TEACHER_RUN)/result.json: | $(READY)
	$(KDCACHE) train-teacher --dataset $(DATASET) $(SOURCE) --model $(TEACHER) --epochs $(EPOCHS) \
		--augment $(AUGMENT) --schedule cosine --learning-rate 2e-3 --out $(TEACHER_RUN) $(call resume,$(TEACHER_RUN)) $(ARGS)

$(DUMPED): $(TEACHER_RUN)/result.json $(if $(wildcard $(CACHE)/zarr.json),,no-cache) | $(READY)
	$(KDCACHE) dump-teacher --dataset $(DATASET) $(SOURCE) --teacher $(TEACHER) \
		--checkpoint $(TEACHER_RUN)/best.pt --split train --split test --out $(CACHE)
	@touch $@

# A stamp whose cache is gone counts for nothing.
.PHONY: no-cache
no-cache:

$(STUDENT_RUN)/result.json: $(DUMPED) | $(READY)
	$(KDCACHE) train-student --cache $(CACHE) $(SOURCE) --student $(STUDENT) --epochs $(EPOCHS) \
		--temperature $(TEMPERATURE) --alpha $(ALPHA) --out $(STUDENT_RUN) $(call resume,$(STUDENT_RUN)) $(ARGS)

$(ALONE_RUN)/result.json: $(DUMPED) | $(READY)
	$(KDCACHE) train-student --cache $(CACHE) $(SOURCE) --student $(STUDENT) --epochs $(EPOCHS) \
		--no-distill --out $(ALONE_RUN) $(call resume,$(ALONE_RUN)) $(ARGS)

test: $(READY) ## run the tests, on all cores
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

lint: $(READY) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(READY) ## time the cache against the live teacher, side by side
	$(BIN)/python -m tests.benchmarks $(ARGS)

clean: ## remove what make made: runs and caches of tools, not the data
	rm -rf .venv runs build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find kdcache tests -name __pycache__ -type d -exec rm -rf {} +
