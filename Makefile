# make demo: everything from pictures to generated samples. make test: what CI runs. make help: the rest.
PYTHON ?= python3
DEMO ?= demo
TRAIN_OPTIONS ?=
BIN := .venv/bin
# accelerate gives a process one thread unless told otherwise.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(shell nproc)

.DELETE_ON_ERROR:
.PHONY: help install demo test lint types unit test-faults test-multinode clean-demo

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: .venv/.installed ## the virtual environment, with everything that CPU work and the tests need

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip uninstall -qqq --yes onnxruntime-gpu # of a gpu-check: the CPU's owns the same module
	$(BIN)/python -m pip install --progress-bar off --quiet -c constraints.txt -e '.[cpu,data,eval,dev,tensorrt-rtx]'
	@touch $@

system: ## the Debian packages that the tests use: a browser, nginx, Prometheus
	@sh tests/system.sh

# Every step below goes on where it was interrupted, and is skipped when its result is there.
demo: $(DEMO)/report.html ## faces -> shards -> GAN -> ONNX -> throughput -> 1,000 samples -> report
	@echo
	@echo "Done. Look at:"
	@echo "  $(DEMO)/report.html              the whole story on one page"
	@echo "  $(DEMO)/run/samples/             the same 64 samples as training went on"
	@echo "  $(DEMO)/bench/                   sampling throughput on this machine"
	@echo "  $(DEMO)/samples/                 1,000 generated images in shards, with their manifest"

$(DEMO)/data/dataset.json: | .venv/.installed
	@echo "== 1/6 shards from the bundled faces"
	$(BIN)/dcgan-data build webdataset data/faces $(DEMO)/data --size 64 --encoding packed

# Ctrl-C is for the trainer alone, which saves (once it has started up): the launcher would not wait for that, and end
# with a traceback of its own.
$(DEMO)/.trained: $(DEMO)/data/dataset.json
	@echo "== 2/6 training"
	trap '' INT; $(LAUNCH) pipeline/train.py --data $(DEMO)/data --out $(DEMO)/run --preset demo $(TRAIN_OPTIONS)
	@touch $@

$(DEMO)/model/model.json: $(DEMO)/.trained
	@echo "== 3/6 export"
	$(BIN)/dcgan-export onnx --ckpt $(DEMO)/run --out $(DEMO)/model

$(DEMO)/bench/bench.json: $(DEMO)/model/model.json
	@echo "== 4/6 sampling throughput"
	$(BIN)/dcgan-export bench --ckpt $(DEMO)/run --model $(DEMO)/model/model.onnx --out $(DEMO)/bench --quick

$(DEMO)/samples/manifest.json: $(DEMO)/model/model.json
	@echo "== 5/6 1,000 samples"
	$(BIN)/dcgan-generate --model $(DEMO)/model/model.onnx --count 1000 --out $(DEMO)/samples

$(DEMO)/report.html: $(DEMO)/bench/bench.json $(DEMO)/samples/manifest.json
	@echo "== 6/6 report"
	$(BIN)/dcgan-eval report $(DEMO)/run --bench $(DEMO)/bench/bench.json --out $@

clean-demo: ## forget the demo
	rm -rf $(DEMO)

test: system lint types unit ## what CI runs

lint: .venv/.installed ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed ## mypy --strict
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks/*.py

unit: .venv/.installed ## pytest, with coverage
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow" --ignore tests/k8s --durations=15 --cov=pipeline --cov=export --cov=deploy --cov-report=term

test-slow: test-faults test-multinode test-metrics test-k8s test-containers ## everything that `make test` leaves out
	$(BIN)/pytest -m slow tests/export tests/deploy

test-faults: .venv/.installed ## power cut at every write, kills at random moments, full disk, damaged checkpoints
	$(BIN)/pytest tests/faults

test-multinode: .venv/.installed ## two machines as network namespaces: cut cable, lost node, gang restart (root)
	$(BIN)/pytest -m slow tests/multinode

test-metrics: system .venv/.installed ## a real Prometheus, every alert provoked, every panel drawn
	$(BIN)/pytest tests/metrics

test-k8s: ## render every overlay; schemas, checkov, our own rules, each broken once
	sh tests/k8s/run.sh

test-containers: .venv/.installed ## build the image, run the cpu-demo overlay's Jobs under podman (root)
	sh tests/containers/run.sh

metrics-demo: system .venv/.installed ## Prometheus and the dashboards beside a running demo; Ctrl-C ends it
	$(BIN)/python -m deploy.prometheus.demo

.PHONY: gpu-check
gpu-check: .venv/.installed-gpu ## on a machine with an NVIDIA GPU: tests/gpu, engines, benchmarks, a result file
	$(BIN)/python benchmarks/gpu_check.py gpu-check

# onnxruntime and onnxruntime-gpu own the same module, and must never both be there; the GPU's runs on the CPU, too.
.venv/.installed-gpu: .venv/.installed
	@$(BIN)/python -c 'import sys, export.format.driver as d; sys.exit(d.driver_version() is None and "error: no NVIDIA GPU with a driver here")'
	$(BIN)/python -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu
	$(BIN)/python -m pip install --progress-bar off --quiet -c constraints.txt -e '.[gpu,tensorrt,tensorrt-rtx,data,eval,dev]'
	@touch $@
