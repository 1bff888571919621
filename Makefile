# Two commands for a fresh machine: `make quickstart` and `make test`. Each makes .venv first, once.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed
	$(RUN) -m jaxbias compare --config=configs/quickstart.py --workdir=runs/quickstart

test: $(VENV)/.tested
	$(RUN) -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

lint: $(VENV)/.tested
	$(VENV)/bin/ruff check .

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("jaxbias needs Python 3.11 or newer, this is %d.%d; say which: make PYTHON=python3.12" % v[:2])'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs *.egg-info
