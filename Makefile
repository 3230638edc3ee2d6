# make demo: text in one network call, from nothing, on a laptop.   make test: the tests.   make slow: those that take long.
# What the README reports, made anew: make frontier (80 minutes), long (75), ablations (110), channels (25),
# dates (40), dates-diffuseq (16), speed (50), weights.
PYTHON ?= python3
PY = .venv/bin/python
D = out/dates
Q = out/dates-diffuseq

demo: .venv
	$(PY) prepare_data.py pydocs
	$(PY) train_teacher.py
	$(PY) distill.py
	$(PY) sample.py --compare out/pydocs/teacher --temperature 0.75

test: .venv
	$(PY) -m pytest -q -o markers=slow -m 'not slow' test_core.py

slow: .venv
	$(PY) -m pytest -q -o markers=slow -m slow test_core.py

# three seeds of the flow and of the two baselines, trained as long as teacher and student together;
# AR overfits before that and stops at 950 iterations; the scorer is wider. Baselines: --code 32, as measured
frontier: data/pydocs
	for S in 0 1 2; do \
	  $(PY) train_teacher.py --seed $$S --out out/$$S/flm/teacher && \
	  $(PY) distill.py out/$$S/flm/teacher --seed $$S && \
	  $(PY) train_teacher.py --seed $$S --model mdlm --code 32 --iters 2500 --out out/$$S/mdlm && \
	  $(PY) train_teacher.py --seed $$S --model ar --code 32 --iters 950 --dropout 0.2 --out out/$$S/ar || exit; \
	done
	$(PY) train_teacher.py --model ar --code 32 --iters 500 --dropout 0.2 --width 192 --seed 7 --out out/scorer
	$(PY) bench.py quality 'out/{seed}/flm/student' 'out/{seed}/flm/teacher' 'out/{seed}/mdlm' 'out/{seed}/ar' \
	  --nfe 1 2 4 8 32 --seeds 3 --scorer out/scorer --out assets/pydocs.json

# the same with four times the training, one seed; the weights in assets/ are from here
long: data/pydocs
	$(PY) train_teacher.py --iters 4800 --out out/long/flm/teacher
	$(PY) distill.py out/long/flm/teacher --iters 900
	$(PY) distill.py out/long/flm/teacher --iters 900 --bigrams 0 --out out/long/flm/alone
	$(PY) train_teacher.py --model mdlm --code 32 --iters 7600 --out out/long/mdlm
	$(PY) bench.py quality out/long/flm/student out/long/flm/alone out/long/flm/teacher out/long/mdlm \
	  --nfe 1 2 4 8 32 --seeds 2 --scorer out/scorer --out assets/long.json

# what each part of the recipe brings, at equal time, one change at a time; after make frontier
ablations: data/pydocs
	for S in 0 1; do \
	  for A in uniform paper; do \
	    $(PY) train_teacher.py --seed $$S --axis $$A --out out/$$S/$$A/teacher && \
	    $(PY) distill.py out/$$S/$$A/teacher --seed $$S || exit; \
	  done; \
	  $(PY) train_teacher.py --seed $$S --squared --out out/$$S/squared/teacher && \
	  $(PY) distill.py out/$$S/squared/teacher --seed $$S || exit; \
	  for M in lagrangian semigroup eulerian; do \
	    $(PY) distill.py out/$$S/flm/teacher --seed $$S --method $$M --rollout 0 --iters 500 --out out/$$S/flm/$$M || exit; \
	  done; \
	  $(PY) distill.py out/$$S/flm/teacher --seed $$S --temperature 1 --out out/$$S/flm/warm && \
	  $(PY) distill.py out/$$S/flm/teacher --seed $$S --balance 0 --out out/$$S/flm/unbalanced && \
	  $(PY) distill.py out/$$S/flm/teacher --seed $$S --bigrams 0 --out out/$$S/flm/alone || exit; \
	done
	$(PY) bench.py quality 'out/{seed}/flm/student' 'out/{seed}/flm/alone' 'out/{seed}/flm/unbalanced' \
	  'out/{seed}/flm/warm' 'out/{seed}/flm/lagrangian' 'out/{seed}/flm/semigroup' 'out/{seed}/flm/eulerian' \
	  'out/{seed}/uniform/student' 'out/{seed}/paper/student' 'out/{seed}/squared/student' \
	  --nfe 1 4 --seeds 2 --scorer out/scorer --out assets/students.json
	$(PY) bench.py quality 'out/{seed}/flm/teacher' 'out/{seed}/uniform/teacher' 'out/{seed}/paper/teacher' \
	  'out/{seed}/squared/teacher' --nfe 8 32 --seeds 2 --scorer out/scorer --out assets/teachers.json
	for X in ab2 bridge; do \
	  $(PY) bench.py quality 'out/{seed}/flm/teacher' --sampler $$X --nfe 8 32 --seeds 2 --scorer out/scorer \
	    --out assets/$$X.json || exit; \
	done
	$(PY) bench.py quality 'out/{seed}/flm/teacher' --gamma 1 --nfe 8 32 --seeds 2 --scorer out/scorer --out assets/gamma.json
	$(PY) bench.py quality 'out/{seed}/flm/teacher' --sampler ab2 --temperature 0.75 --nfe 8 32 --seeds 2 \
	  --scorer out/scorer --out assets/cool.json

# embeddings of fewer and of more channels, one seed
channels: data/pydocs
	for C in 2 4 32; do \
	  $(PY) train_teacher.py --code $$C --out out/code-$$C/teacher && $(PY) distill.py out/code-$$C/teacher || exit; \
	done
	$(PY) bench.py quality out/0/flm/student out/code-2/student out/code-4/student out/code-32/student \
	  --nfe 1 --seeds 2 --scorer out/scorer --out assets/channels.json

# a flow map, then three rounds in which a frozen student teaches a copy of itself one call; mdlm
# trains as long as all of these together
dates: data/dates
	$(PY) train_teacher.py --data data/dates --code 2 --axis 0.7 --iters 2500 --decay 0.9
	$(PY) distill.py $D/teacher --method lagrangian --temperature 1 --balance 0 --bigrams 0 --iters 600 --decay 0.9
	$(PY) distill.py $D/teacher --guide $D/student --temperature 1 --balance 0 --bigrams 0 --out $D/one-call-1 \
	  --iters 600 --decay 1
	$(PY) distill.py $D/teacher --guide $D/one-call-1 --temperature 1 --balance 0 --bigrams 0 --out $D/one-call-2 \
	  --iters 800 --decay 1 --lr 1e-3 --muon-lr 0.005
	$(PY) distill.py $D/teacher --guide $D/one-call-2 --temperature 1 --balance 0 --bigrams 0 --out $D/one-call \
	  --iters 700 --decay 1 --lr 1e-3 --muon-lr 0.005
	$(PY) train_teacher.py --data data/dates --model mdlm --code 32 --iters 8000 --decay 0.9 --out $D/mdlm
	$(PY) bench.py quality $D/teacher $D/student $D/one-call $D/mdlm --nfe 1 2 4 8 64 --rows 1000 --seeds 2 \
	  --out assets/dates.json

# the other paper's pair, score distillation and two such rounds
dates-diffuseq: data/dates
	$(PY) train_teacher.py --data data/dates --model diffuseq --code 8 --iters 1500 --decay 0.9
	$(PY) distill.py $Q/teacher --iters 400 --decay 0.9 --eval-every 100
	$(PY) distill.py $Q/teacher --guide $Q/student --out $Q/one-call-1 --iters 600 --decay 1
	$(PY) distill.py $Q/teacher --guide $Q/one-call-1 --out $Q/one-call --iters 700 --decay 1
	$(PY) bench.py quality $Q/teacher $Q/student $Q/one-call --sampler ddim --nfe 1 4 50 --rows 1000 --seeds 2 \
	  --out assets/dates-diffuseq.json
	$(PY) bench.py quality $Q/teacher $Q/one-call --nfe 1 2000 --rows 64 --out assets/dates-2000.json

# after make frontier; an untrained model is as fast as a trained one
speed:
	$(PY) bench.py train 1,128,50257,256 16,128,50257,256 16,128,8192,256 16,128,1024,256 32,64,8192,256 \
	  4,512,8192,256 2,1024,8192,256 16,128,8192,512 16,128,1024,512 --out assets/train.json
	$(PY) bench.py train 64,128,50257,256 64,128,1024,512 --out assets/train-8k.json
	$(PY) bench.py speed 'out/{seed}/flm/student@1,4' 'out/{seed}/flm/teacher@32,128,1024' 'out/{seed}/mdlm@8,64' \
	  'out/{seed}/ar' diffuseq,32,2048,128@50,2000 --batch 1 8 --beside assets/pydocs.json --out assets/speed.json
	$(PY) bench.py speed out/0/flm/student@1 --batch 1 8 64 256 --out assets/one.json

weights:
	$(PY) sample.py out/long/flm/student --export assets/pydocs-student.pt
	$(PY) sample.py out/long/flm/teacher --export assets/pydocs-teacher.pt
	$(PY) sample.py out/dates/teacher --export assets/dates-teacher.pt
	$(PY) sample.py out/dates/one-call --export assets/dates-one-call.pt
	# packed they are a tenth smaller, and torch reads them as before
	cd assets && for W in *.pt; do \
	  ../$(PY) -m zipfile -e $$W t && (cd t && ../../$(PY) -m zipfile -c ../$$W *) && rm -r t || exit; \
	done
	$(PY) sample.py assets/dates-one-call.pt --source 2024-02-29 --compare out/dates/teacher \
	  --film assets/dates-film.svg
	cd assets && sha256sum *.pt > SHA256SUMS

data/%: | .venv
	$(PY) prepare_data.py $*

.venv: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch .venv

.PHONY: demo test slow frontier long ablations channels dates dates-diffuseq speed weights
