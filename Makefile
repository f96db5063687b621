# make demo runs everything from pictures to samples; make test is what CI runs; make help lists all targets.
PYTHON ?= python3
DEMO ?= demo
TRAIN_OPTIONS ?=
BIN := .venv/bin
# Where the processor multiplies bf16, it takes half the time, for pictures as good (docs/training.md); elsewhere it is slow.
PRECISION ?= $(shell grep -qsE 'amx_bf16|avx512_bf16' /proc/cpuinfo && echo bf16 || echo no)
# accelerate gives a process one thread unless told otherwise.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision $(PRECISION) \
	--dynamo_backend no --num_cpu_threads_per_process $(shell nproc)

.DELETE_ON_ERROR:
.PHONY: help install system system-slow system-check demo clean-demo test lint types unit coverage test-slow test-faults \
	test-chaos test-multinode test-metrics test-k8s test-containers test-slurm test-interop test-trackers test-explore test-long metrics-demo \
	gpu-check

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: .venv/.installed ## create .venv with everything that CPU work and the tests need

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip uninstall -qqq --yes onnxruntime-gpu # from a gpu-check; onnxruntime owns the same module
	$(BIN)/python -m pip install --progress-bar off --quiet -c constraints.txt -e '.[cpu,data,eval,dev,tensorrt-rtx]'
	@touch $@

system: ## install the Debian packages that the tests use: a browser, nginx, Prometheus (root)
	@sh tests/system.sh install

system-slow: ## install those that only `make test-slow` uses, too: podman, Slurm (root)
	@sh tests/system.sh install slow

system-check:
	@sh tests/system.sh check

# Every step below resumes where it was interrupted, and is skipped when its result exists.
demo: $(DEMO)/report.html ## faces -> shards -> GAN -> ONNX -> throughput -> 1,000 samples -> report
	@echo
	@echo "Done. Look at:"
	@echo "  $(DEMO)/report.html              everything on one page"
	@echo "  $(DEMO)/run/samples/             the same 64 samples at intervals during training"
	@echo "  $(DEMO)/bench/                   sampling throughput on this machine"
	@echo "  $(DEMO)/samples/                 1,000 generated images in shards, with their manifest"

$(DEMO)/data/dataset.json: | .venv/.installed
	@echo "== 1/6 shards from the bundled faces"
	$(BIN)/dcgan-data build webdataset data/faces $(DEMO)/data --size 64 --encoding packed

# Only the trainer must receive Ctrl-C, because it saves. The launcher would not wait for it, and would print a traceback.
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
	@echo "== 6/6 animations, report"
	$(BIN)/dcgan-eval progress $(DEMO)/run
	$(BIN)/dcgan-eval walk --ckpt $(DEMO)/run
	$(BIN)/dcgan-eval report $(DEMO)/run --bench $(DEMO)/bench/bench.json --out $@

clean-demo: ## delete the demo's results
	rm -rf $(DEMO)

test: system-check lint ## what CI runs; names the Debian packages that are missing, and installs none
	@$(MAKE) --no-print-directory --jobs 2 types unit

lint: .venv/.installed ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed ## mypy --strict
	$(BIN)/mypy
	for file in tests/*/conftest.py; do $(BIN)/mypy $$file || exit; done # apart, because they all have one name

# One thread each, because they share the cores. Three for two cores, because a third of their time is waiting.
unit: .venv/.installed ## pytest, without the slow tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile -m "not slow" --ignore tests/k8s --durations=25 --no-loadscope-reorder

coverage: .venv/.installed ## the same with a table of the lines that no test reached
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow" --ignore tests/k8s --cov=pipeline --cov=export --cov=deploy --cov-report=term-missing

test-slow: test-faults test-chaos test-multinode test-metrics test-k8s test-containers test-slurm test-interop test-trackers test-explore test-long ## every test that `make test` omits

test-long: .venv/.installed ## the slow tests of data, export, deploy, training, presets and hostile files: 2,000 damaged tars, 2,000 damaged pictures and containers, every network exported, generation killed again and again
	$(BIN)/pytest -m slow tests/data tests/export tests/deploy tests/training tests/test_presets.py tests/test_hostile_files.py

test-faults: .venv/.installed ## a power cut at every write, kills at random moments, a full disk, damaged checkpoints, ranks that fail or hang
	$(BIN)/pytest tests/faults

test-chaos: .venv/.installed ## pictures to samples over an S3 that fails in every way that passes, by programs that are killed
	$(BIN)/pytest -s tests/chaos

test-multinode: .venv/.installed ## two nodes as network namespaces: cut cable, lost node, gang restart (root)
	$(BIN)/pytest -m slow tests/multinode

test-metrics: system-check .venv/.installed ## a real Prometheus: provoke every alert, draw every panel
	$(BIN)/pytest tests/metrics

test-k8s: ## render every overlay; check schemas, checkov and our rules, and that each rule fails when broken
	sh tests/k8s/run.sh

test-containers: .venv/.installed ## build the image; run the Jobs of the cpu-demo overlay with podman (root)
	sh tests/containers/run.sh

test-slurm: .venv/.installed ## Debian's Slurm with two nodes on loopback: the chain as jobs, stopped and requeued, to the same bytes (root)
	$(BIN)/pytest -m slow -rs tests/slurm

test-interop: .venv/.installed ## our shards in wids, Hugging Face datasets and torchdata, their tables in ours, our models in the oldest runtimes, in JavaScript and without us; installs them
	$(BIN)/python -m pip install --progress-bar off --quiet -c constraints.txt -e '.[interop]'
	$(BIN)/python -m pip install --progress-bar off --quiet --no-deps --upgrade --target build/interop webdataset==0.2.111 torchdata==0.9.0
	$(BIN)/python -m pip install --progress-bar off --quiet --no-deps --upgrade --target build/runtimes/onnxruntime onnxruntime==1.16.0 numpy==1.26.4
	$(BIN)/python -m pip install --progress-bar off --quiet --no-deps --upgrade --target build/runtimes/openvino openvino==2023.0.2 numpy==1.26.4
	$(BIN)/python -m pip install --progress-bar off --quiet --no-deps --upgrade --target build/litdata litdata==0.2.76
	$(BIN)/python -m pip install --progress-bar off --quiet --no-deps --upgrade --target build/streaming mosaicml-streaming==0.13.0 \
		Brotli==1.2.1 python-snappy==0.7.3 cramjam==2.14.0 xxhash==4.1.0 zstd==1.5.7.2 catalogue==2.0.10
	! command -v npm >/dev/null || npm install --prefix build/javascript --ignore-scripts --no-audit --no-fund --loglevel=error \
		onnxruntime-node@1.30.0 onnxruntime-web@1.30.0 # without its script: that downloads CUDA libraries
	test -d build/example || $(PYTHON) -m venv build/example
	build/example/bin/python -m pip install --progress-bar off --quiet -c constraints.txt onnxruntime numpy pillow
	$(BIN)/pytest -m slow tests/interop
	$(BIN)/pytest tests/data/sources/test_tables.py tests/data/test_convert.py tests/evaluation/test_pictures.py

test-trackers: build/trackers/.installed ## runs that are killed and resumed, in MLflow on its own server and in W&B offline; installs them
	$(BIN)/pytest -m slow -rs tests/training/trackers

# Environments over .venv, because MLflow's server and Gradio want other versions of what is there.
build/trackers/.installed: PACKAGES = wandb==0.31.0 mlflow==3.17.2
build/explore/.installed: PACKAGES = gradio==6.31.0 av==18.1.0
build/%/.installed: .venv/.installed
	$(PYTHON) -m venv build/$*
	build/$*/bin/python -c 'import site, sys; open(site.getsitepackages()[0] + "/base.pth", "w").write(f"import site; site.addsitedir({sys.argv[1]!r})\n")' \
		"$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"
	build/$*/bin/python -m pip install --progress-bar off --quiet --no-warn-conflicts $(PACKAGES)
	@touch $@

test-explore: build/explore/.installed system-check ## the page of dcgan-export explore in a browser, and films; installs Gradio and PyAV
	$(BIN)/pytest -m slow -rs tests/export/explore
	build/explore/bin/python -m pytest -rs tests/evaluation/test_animation.py

metrics-demo: .venv/.installed ## Prometheus and the dashboards beside a running demo; Ctrl-C ends it
	$(BIN)/python -m deploy.prometheus.demo

gpu-check: .venv/.installed-gpu ## with an NVIDIA GPU: tests/gpu, engines, benchmarks, a result file
	$(BIN)/python benchmarks/gpu_check.py gpu-check

# onnxruntime and onnxruntime-gpu own the same module: never install both. The GPU build also runs on the CPU.
.venv/.installed-gpu: .venv/.installed
	@$(BIN)/python -c 'import sys, export.format.driver as d; sys.exit(d.driver_version() is None and "error: no NVIDIA GPU with a driver here")'
	$(BIN)/python -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu
	$(BIN)/python -m pip install --progress-bar off --quiet -c constraints.txt -e '.[gpu,tensorrt,tensorrt-rtx,data,eval,dev]'
	@touch $@
