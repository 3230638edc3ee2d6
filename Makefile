# make demo: text in one network call, from nothing, on a laptop
# make test: the tests; make slow: those that take long; make lint: the linter
# What the page reports, made anew: make stories, dates, dates-diffuseq, speed, weights
PYTHON ?= python3
PY = .venv/bin/python

demo: .venv
	$(PY) prepare_data.py stories
	$(PY) train_teacher.py --data data/stories
	$(PY) distill.py out/stories/teacher
	$(PY) sample.py out/stories/student

test: .venv
	$(PY) -m pytest -q -o markers=slow -m 'not slow' test_core.py

slow: .venv
	$(PY) -m pytest -q -o markers=slow -m slow test_core.py

lint: .venv
	.venv/bin/ruff check --config .ci/ruff.toml .

.venv: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch .venv

data/%: | .venv
	$(PY) prepare_data.py $*

# the weights in assets/ are from here
stories: data/stories
	$(PY) train_teacher.py --data data/stories --iters 7000 --eval-every 1000
	$(PY) distill.py out/stories/teacher --iters 1000 --eval-every 250
	$(PY) bench.py quality out/stories/student out/stories/teacher --nfe 1 2 4 8 32 --seeds 2 \
	  --out assets/stories.json

weights:
	$(PY) sample.py out/stories/student --export assets/stories-student.pt --overwrite
	$(PY) sample.py out/stories/teacher --export assets/stories-teacher.pt --overwrite
	$(PY) sample.py out/dates/teacher --export assets/dates-teacher.pt --overwrite
	$(PY) sample.py out/dates/one-call --export assets/dates-one-call.pt --overwrite
	cd assets && sha256sum *.pt > SHA256SUMS

# a flow map, then three rounds in which a frozen student teaches a copy of itself one call
D = out/dates
dates: data/dates
	$(PY) train_teacher.py --data data/dates --channels 2 --iters 2500 --decay 0.9
	$(PY) distill.py $D/teacher --method lagrangian --iters 600 --decay 0.9
	$(PY) distill.py $D/teacher --guide $D/student --out $D/one-call-1 --iters 600 --decay 1
	$(PY) distill.py $D/teacher --guide $D/one-call-1 --out $D/one-call-2 --iters 800 --decay 1 \
	  --lr 1e-3 --muon-lr 0.005
	$(PY) distill.py $D/teacher --guide $D/one-call-2 --out $D/one-call --iters 700 --decay 1 \
	  --lr 1e-3 --muon-lr 0.005
	$(PY) bench.py quality $D/teacher $D/student $D/one-call --nfe 1 2 4 8 64 --rows 1000 --seeds 2 \
	  --out assets/dates.json

# the other paper's pair: score distillation, then two such rounds
Q = out/dates-diffuseq
dates-diffuseq: data/dates
	$(PY) train_teacher.py --data data/dates --model diffuseq --iters 1500 --decay 0.9
	$(PY) distill.py $Q/teacher --iters 400 --decay 0.9 --eval-every 100
	$(PY) distill.py $Q/teacher --guide $Q/student --out $Q/one-call-1 --iters 600 --decay 1
	$(PY) distill.py $Q/teacher --guide $Q/one-call-1 --out $Q/one-call --iters 700 --decay 1
	$(PY) bench.py quality $Q/teacher $Q/student $Q/one-call --method ddim --nfe 1 4 50 --rows 1000 \
	  --seeds 2 --out assets/dates-diffuseq.json

speed: .venv
	$(PY) bench.py speed student,32,2048,128@1,4 flm,32,2048,128@8,64 mdlm,32,2048,128@8,64 \
	  ar,32,2048,128 diffuseq,32,2048,128@50 --batch 1 64 --out assets/speed.json

.PHONY: demo test slow lint stories dates dates-diffuseq speed weights
