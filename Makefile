# Every command of this project; `make` alone lists them. Kept to what GNU make 3.81 (macOS) understands.
#
#   GPU=1        use .venv-gpu and onnxruntime-gpu; the CPU and GPU builds of ONNX Runtime cannot share an environment
#   PYTHON=…     the interpreter to make the environment with; otherwise the newest one that the pins are checked on
#   SIZE=smoke   with reproduce-…: two minutes on two cores, to see that it runs; otherwise the whole run
#   SIZE=small   three passes over a sixth of the images: half an hour on two cores at most
#   ARGS="…"     passed on to the command behind the target
#   CAPSNET_…    the service's settings, read by the service itself

RUNTIME := $(if $(filter-out 0,$(GPU)),gpu,cpu)
VENV := .venv$(if $(filter gpu,$(RUNTIME)),-gpu)
PY := $(VENV)/bin/python
# Stamps live inside the environment, so that they vanish with it. The second set contains the first.
SERVING := $(VENV)/installed-serving
EVERYTHING := $(VENV)/installed-everything
CANDIDATES := $(if $(PYTHON),"$(PYTHON)",python3.14 python3.13 python3.12 python3.11 python3)
# Held back when the pins are renewed. onnxruntime: the newest that onnxruntime-gpu has too.
# torch: the newest with a CPU build on the machines that test this project.
HOLD := onnxruntime==1.31.1 torch==2.13.0

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# ONNX Runtime's packages report their use to Microsoft unless told not to before they are imported.
export ORT_DISABLE_TELEMETRY := 1
# Weights in large pages: glibc asks Linux for them. See docs/decisions/0044; elsewhere it means nothing.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test test-container picture fuzz soak check lint types imports audit format train evaluate export dimensions \
	visualize robustness detect results bench image constraints proto clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z% -]+:.*## / { printf "  make %-40s %s\n", $$1, $$2 }' Makefile
	@sed -n '2,/^$$/s/^#//p' Makefile

# --- run ---------------------------------------------------------------------------------------------------

serve: $(SERVING) ## serve on 127.0.0.1:8000; CAPSNET_HOST, CAPSNET_PORT, … change that
	@# GPU=1 asks for a GPU: not getting one must be an error, so `auto` is not the default then.
	$(if $(filter gpu,$(RUNTIME)),CAPSNET_DEVICE=$${CAPSNET_DEVICE:-cuda} )$(PY) -m service.main

train evaluate export dimensions visualize: $(EVERYTHING) ## the steps from data to models/; ARGS=--help explains each
	$(PY) -m training.cli $@ $(ARGS)

robustness detect: $(EVERYTHING) ## curves of error on spoiled images; of finding out outliers and attacks; ARGS=--help
	$(PY) -m training.cli $@ $(ARGS)

reproduce-%: $(EVERYTHING) ## train and test one published result; `make reproduce-routing-3 ARGS=--help` lists them
	$(PY) -m training.cli reproduce $* $(if $(SIZE),--size $(SIZE)) $(ARGS)

results: $(EVERYTHING) ## write docs/results/table1.md from the records of such runs
	$(PY) -m training.cli $@ $(ARGS)

bench: $(EVERYTHING) ## measure speed and memory into docs/results; ARGS=--help
	$(PY) -m benchmarks $(ARGS)

# --- check -------------------------------------------------------------------------------------------------

# A process for each core, and four at most: each has the networks of its tests in memory. ARGS=-n0: all in one.
test: $(EVERYTHING) ## every test that this machine can run
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder $(ARGS)

test-container: $(EVERYTHING) ## build the image and test the running container; needs a Docker engine
	@docker info >/dev/null 2>&1 || { \
		echo "make: no Docker engine answers at $${DOCKER_HOST:-its default address}: start one, or set DOCKER_HOST." >&2; \
		exit 1; }
	$(PY) -m pytest tests/container $(ARGS)

picture: $(EVERYTHING) ## take docs/playground.png; needs Chromium or Chrome
	$(PY) -m tests.browser.picture docs/playground.png

fuzz: $(EVERYTHING) ## schemathesis against a served process; ARGS="--max-examples 1000 --seed 7 --models models"
	$(PY) -m tests.fuzz.run $(ARGS)

soak: $(EVERYTHING) ## 15 minutes of mixed and hostile load; ARGS="--duration 60", ARGS=--goodput, ARGS="--models models"
	$(PY) -m tests.soak.run $(ARGS)

check: lint types imports audit ## lint, format, types, import rules, known vulnerabilities

lint: $(EVERYTHING)
	$(PY) -m ruff check
	$(PY) -m ruff format --check

types: $(EVERYTHING)
	$(PY) -m mypy

imports: $(EVERYTHING)
	$(VENV)/bin/lint-imports --no-logo

# pip-audit exits with 1 for a vulnerability as for a service that it cannot reach, but only the first writes a report;
# and with 0 for pins without vulnerabilities as for those that its service does not know, which its report then names.
audit: $(EVERYTHING)
	@mkdir -p build && rm -f build/audit.txt
	@echo "$(PY) -m pip_audit (the pins in constraints.txt)"
	@$(PY) -m pip_audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off \
		--output build/audit.txt 2>build/audit.log; \
	code=$$?; \
	pins=$$(grep -c '^[^#]' constraints.txt); missed=$$(grep -cs 'could not be audited' build/audit.txt); \
	if [ $$code -eq 0 ] && [ "$$missed" = "$$pins" ]; then \
		echo "audit: not run: pip-audit's service knows none of the $$pins pins"; \
	elif [ $$code -eq 0 ]; then \
		tail -n 1 build/audit.log; \
		[ "$${missed:-0}" -eq 0 ] || \
			echo "audit: $$missed of the $$pins pins were not audited: pip-audit's service does not know them"; \
	elif [ -s build/audit.txt ]; then cat build/audit.txt; exit 1; \
	elif [ $$code -eq 1 ]; then \
		echo "audit: not run: pip-audit had no answer from its service ($$(tail -n 1 build/audit.log | cut -c 1-200))"; \
	else cat build/audit.log; exit $$code; fi

format: $(EVERYTHING) ## put the code into the form that `make check` wants
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

# --- build -------------------------------------------------------------------------------------------------

image: ## the container image capsnet:cpu, or with GPU=1 capsnet:gpu
	docker build --build-arg RUNTIME=$(RUNTIME) --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null) \
		--tag capsnet:$(RUNTIME) $(ARGS) .

# Run on the oldest supported Python: what it can install, the newer ones can too, but not the other way round.
constraints: ## renew every pin in constraints.txt; needs Python 3.11
	@command -v python3.11 >/dev/null || { echo "make: renewing the pins needs python3.11 on PATH." >&2; exit 1; }
	rm -rf build/constraints && python3.11 -m venv build/constraints
	build/constraints/bin/python -m pip install '.[cpu,train,dev]' $(HOLD)
	@{ sed -n '/^[^#]/q;p' constraints.txt; \
		build/constraints/bin/python -m pip freeze --all --exclude pip --exclude capsnet \
			| grep -v -e '^nvidia-' -e '^cuda-' -e '^triton=' | sed 's/+[^+]*$$//'; \
		echo '$(filter onnxruntime==%,$(HOLD))' | sed 's/==/-gpu==/'; \
	} >build/constraints.txt
	build/constraints/bin/python -m pip install --dry-run --quiet --constraint build/constraints.txt '.[gpu]'
	mv build/constraints.txt constraints.txt && rm -rf build/constraints

# protoc comes with grpcio-tools, which nothing else here needs; its version decides the least protobuf.
proto: $(PY) ## write service/oip_pb2.py from service/oip.proto
	rm -rf build/proto && $(PY) -m pip install --quiet --target build/proto \
		"grpcio-tools==$$(sed -n 's/^grpcio==//p' constraints.txt)" --constraint constraints.txt
	PYTHONPATH=build/proto $(PY) -m grpc_tools.protoc -I. --python_out=. --pyi_out=. service/oip.proto
	rm -rf build/proto

clean: ## remove environments and caches; keeps data/, models/ and runs/
	rm -rf .venv .venv-gpu build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage
	find benchmarks service tests training -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments ------------------------------------------------------------------------------------------

$(SERVING): pyproject.toml constraints.txt $(PY) | $(VENV)/bin/pip
	@echo "Installing what serving needs into $(VENV)"
	$(PY) -m pip install --editable '.[$(RUNTIME)]' --constraint constraints.txt
	@touch $@

$(EVERYTHING): pyproject.toml constraints.txt $(PY) | $(VENV)/bin/pip
	@echo "Installing what serving, training and the tests need into $(VENV)"
	$(PY) -m pip install --editable '.[$(RUNTIME),train,dev]' --constraint constraints.txt
	@touch $(SERVING) $@

# Made anew when its interpreter is gone, and when pip is: venv puts pip in last, so without it venv was interrupted.
$(VENV)/bin/pip: | $(PY)
	@$(MAKE_VENV)

$(PY):
	@$(MAKE_VENV)

define MAKE_VENV
found=; chosen=; \
for python in $(CANDIDATES); do \
	version=$$("$$python" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue; \
	found="$$found $$python ($$version)"; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' && { chosen=$$python; break; }; \
done; \
[ -n "$$chosen" ] || { \
	echo "make: Python 3.11 or newer is needed; found:$${found:- none of $(subst ",,$(CANDIDATES))}." \
		"Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }; \
"$$chosen" -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "make: $$chosen cannot make virtual environments: its modules venv and ensurepip are missing." \
		"On Debian and Ubuntu: apt install python$${version%.*}-venv" >&2; exit 1; }; \
echo "Making $(VENV) with $$chosen ($$version)"; \
"$$chosen" -m venv --clear $(VENV)
endef
