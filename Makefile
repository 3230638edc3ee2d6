# make demo: text in one network call, from nothing, on a laptop.   make test: the tests.   make slow: those that take long.
PYTHON ?= python3
PY = .venv/bin/python

demo: .venv
	$(PY) prepare_data.py pydocs
	$(PY) train_teacher.py
	$(PY) distill.py
	$(PY) sample.py --compare out/pydocs/teacher

test: .venv
	$(PY) -m pytest -q -o markers=slow -m 'not slow' test_core.py

slow: .venv
	$(PY) -m pytest -q -o markers=slow -m slow test_core.py

.venv: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch .venv

.PHONY: demo test slow
