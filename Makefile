# `make help` lists the targets. Everything is installed into .venv inside the checkout, with the versions of
# constraints.txt.
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.prefopt-installed
export HF_HUB_OFFLINE ?= 1

# Of the reproductions: lab (minutes), mini (hours, SmolLM2-135M) or paper; where the jobs run; further arguments (ARGS="launcher.at_once=2",
# ARGS=--dry-run).
SCALE ?= lab
LAUNCHER ?= local
ARGS ?=
KILLS ?= 60

.PHONY: help setup docs demo lab lab-family test test-shared test-slow test-long test-kills test-gpu slurm-test lint bench bench-gpu bench-fidelity clean-demo figures \
	reproduce-mmpo reproduce-mappo reproduce-madpo

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMP) ## install everything into .venv (done once)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	@PYTHON=$(PYTHON) scripts/setup.sh
	@touch $@

demo: setup ## train SmolLM2-135M with DPO, SimPO and MMPO: runs/demo
	$(BIN)/python -m prefopt.train -m +sweep=demo $(ARGS)
	$(BIN)/python -m prefopt.report runs_dir=runs/demo output=runs/demo/report
	@echo; cat runs/demo/report/table.md; echo
	@echo "Oracle reward over KL: $(CURDIR)/runs/demo/report/reward_kl.png"
	@echo "See whether the reward rises above the initial policy's, and how far each objective goes from it (KL)."
	@echo "Read answers side by side:"
	@echo "  $(BIN)/python -m prefopt.compare judge=reward_model $$(ls -d runs/demo/dpo-* runs/demo/mmpo-* | sed 's/^/run=/' | xargs)"

clean-demo: ## forget the demo's runs, so that `make demo` trains again
	rm -rf runs/demo

lab: setup ## methods compared where every quantity is exact; SEEDS=5, docs/laboratory.md
	scripts/lab/all.sh launcher=$(LAUNCHER) $(ARGS)

lab-family: setup ## after make lab: the other objectives there, and GRPO, RLOO, RAFT online
	scripts/lab/family.sh launcher=$(LAUNCHER) $(ARGS)

reproduce-mmpo: setup ## MMPO in the laboratory, or SCALE=mini, or SCALE=paper LAUNCHER=slurm
reproduce-mappo: setup ## MaPPO, offline and online, likewise
reproduce-madpo: setup ## MADPO's three data qualities, likewise
reproduce-mmpo reproduce-mappo reproduce-madpo: reproduce-%:
	scripts/$(SCALE)/$*.sh launcher=$(LAUNCHER) $(ARGS)

figures: setup ## tables, figures and pages of results/ from its records
	for folder in $$(find results -name records.jsonl | xargs dirname); do \
		$(BIN)/python -m prefopt.report runs_dir=$$folder/records.jsonl output=$$folder || exit 1; \
	done
	$(BIN)/python -m prefopt.papers paper=mmpo output=results/paper/mmpo
	$(BIN)/python -m prefopt.papers paper=mappo runs_dir=results/mini/mappo/records.jsonl output=results/mini/mappo
	$(BIN)/python -m prefopt.papers paper=mappo runs_dir=results/lab/objectives/records.jsonl output=results/lab/objectives
	for folder in mmpo/methods madpo/methods madpo/variants; do \
		$(BIN)/python -m prefopt.papers paper=$${folder%/*} runs_dir=results/lab/$$folder/records.jsonl \
			output=results/lab/$$folder || exit 1; \
	done
	$(BIN)/python -m prefopt.claims

test: setup ## the tests (a few minutes), in two processes
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-shared: setup ## those of the tests that need real data beside the checkout
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "shared and not slow and not slurm"

test-slow: setup ## those that take longer: SmolLM2-135M, several processes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not long"

test-long: setup ## the longest of all: every relative on SmolLM2-135M, FSDP on two nodes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long

test-kills: setup ## KILLS kills of each configuration at random moments
	KILLS=$(KILLS) $(BIN)/python -m pytest -m kills -s -o timeout=0

test-gpu: setup ## on a GPU: layouts, log-probs, references, engines, memory (never run yet)
	$(BIN)/python -m pytest -m gpu tests/gpu

slurm-test: setup ## sweeps of the tiny model through a Slurm of one node, and of two
	$(BIN)/python -m pytest -m "slurm and not long" -s

bench: setup ## measure, on this machine; results/bench
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.ranks
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.steps

bench-gpu: setup ## on a GPU: steps against TRL, models of 135M, 1B and 8B; results/bench/gpu.json (never run yet)
	$(BIN)/python -m benchmarks.steps --device cuda --steps 5 --only chat,long_prompts,sampling,models

bench-fidelity: setup ## AlpacaEval's win rates again (needs shared files)
	$(BIN)/python -m pytest tests/evaluation/test_alpaca.py -m slow -k published -s

lint: setup ## ruff, mypy and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup ## the pages, into site/ (open site/index.html)
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict
