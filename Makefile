# make demo: text in one network call, from nothing, on a laptop
# make test: the tests; make slow: those that take long; make lint: the linter
# What the page reports, made anew: make stories, short, pydocs, dates,
# dates-diffuseq, qqp, speed, weights
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

# the weights in assets/ are from the first two lines, an hour and a quarter of one core; masked
# diffusion is trained as long as both, and then distilled; AR needs a quarter of an hour
S = out/stories
stories: data/stories
	$(PY) train_teacher.py --data data/stories --layers 6 --iters 2600 --eval-every 1300
	$(PY) distill.py $S/teacher --lessons 130000 --iters 8000 --eval-every 2000
	$(PY) train_teacher.py --data data/stories --model mdlm --layers 6 --iters 11500 \
	  --eval-every 2300
	$(PY) distill.py $S-mdlm/teacher --iters 5000 --eval-every 2500
	$(PY) train_teacher.py --data data/stories --model ar --layers 6 --iters 2000 \
	  --eval-every 1000
	$(PY) bench.py quality $S/teacher $S/student $S-mdlm/teacher $S-mdlm/sdtt $S-ar/teacher \
	  --nfe 1 2 4 8 32 64 --rows 500 --seeds 2 --out assets/stories.json --overwrite

# one call beside its rivals, each trained three times, for about eight minutes of one core with
# AVX512 (OMP_NUM_THREADS=1); masked diffusion is trained as long as the flow's teacher and student,
# and then distilled; the autoregressive model needs little more than two
B = out/short
short: short-0 short-1 short-2
	$(PY) bench.py quality $B-{seed}/flow/teacher $B-{seed}/flow/student $B-{seed}/paper/teacher \
	  $B-{seed}/paper/student $B-{seed}/mdlm/teacher $B-{seed}/mdlm/sdtt $B-{seed}/ar/teacher \
	  --nfe 1 2 4 8 32 --rows 500 --seeds 3 --out assets/stories-short.json --overwrite

short-%: data/stories
	$(PY) train_teacher.py --data data/stories --out $B-$*/flow/teacher --seed $*
	$(PY) distill.py $B-$*/flow/teacher --seed $*
	$(PY) train_teacher.py --data data/stories --out $B-$*/paper/teacher --stagger 0 --seed $*
	$(PY) distill.py $B-$*/paper/teacher --method semigroup --diagonal 0.5 --boundary 0.03125 \
	  --noise-values 0 --given 0 --iters 1300 --seed $*
	$(PY) train_teacher.py --data data/stories --model mdlm --out $B-$*/mdlm/teacher --iters 1950 \
	  --seed $*
	$(PY) distill.py $B-$*/mdlm/teacher --iters 1000 --seed $*
	$(PY) train_teacher.py --data data/stories --model ar --out $B-$*/ar/teacher --iters 500 \
	  --seed $*

# the docstrings of Python: real text, too rich for two million parameters; three trainings of each
P = out/pydocs
pydocs: pydocs-0 pydocs-1 pydocs-2
	$(PY) bench.py quality $P-{seed}/teacher $P-{seed}/student $P-{seed}/mdlm \
	  --nfe 1 2 4 8 32 --rows 300 --seeds 3 --out assets/pydocs.json --overwrite

pydocs-%: data/pydocs
	$(PY) train_teacher.py --data data/pydocs --out $P-$*/teacher --axis loss --channels 8 \
	  --stagger 0 --batch 64 --iters 2600 --eval-every 650 --seed $*
	$(PY) distill.py $P-$*/teacher --lessons 6000 --iters 900 --seed $*
	$(PY) train_teacher.py --data data/pydocs --out $P-$*/mdlm --model mdlm --iters 2400 \
	  --eval-every 600 --seed $*

weights:
	$(PY) sample.py out/stories/student --export assets/stories-student.pt --overwrite
	$(PY) sample.py out/stories/teacher --export assets/stories-teacher.pt --overwrite
	$(PY) sample.py out/dates/long --export assets/dates-one-call.pt --overwrite
	cd assets && sha256sum *.pt > SHA256SUMS
	$(PY) sample.py assets/stories-student.pt --compare assets/stories-teacher.pt \
	  --film assets/stories-film.svg --overwrite

# a flow map whose lessons are of eight calls, as are enough for eight minutes, and one of forty, of
# more and better lessons, whose weights are in assets/. The baseline is trained as long as the former
D = out/dates
dates: data/dates
	$(PY) train_teacher.py --data data/dates --channels 1 --no-hidden-input --stagger 0 \
	  --iters 1500 --batch 64 --decay 0.9
	$(PY) distill.py $D/teacher --rollout 8 --noise-values 4 --lessons 40000 --iters 2000
	$(PY) distill.py $D/teacher --out $D/long --noise-values 3 --lessons 120000 --iters 8000 \
	  --eval-every 2000
	$(PY) train_teacher.py --data data/dates --model mdlm --batch 64 --iters 5000
	$(PY) bench.py quality $D/teacher $D/student $D/long $D-mdlm/teacher --nfe 1 2 4 8 32 \
	  --rows 500 --seeds 2 --out assets/dates.json --overwrite

# the other paper's pair: score distillation, with one noise for a row and with one for each position
# as in the paper, then two such rounds
Q = out/dates-diffuseq
dates-diffuseq: data/dates
	$(PY) train_teacher.py --data data/dates --model diffuseq --iters 1500 --decay 0.9
	$(PY) distill.py $Q/teacher --iters 400 --decay 0.9 --eval-every 100
	$(PY) distill.py $Q/teacher --no-row-noise --out $Q/position --iters 400 --decay 0.9 \
	  --eval-every 100
	$(PY) distill.py $Q/teacher --guide $Q/student --out $Q/one-call-1 --iters 600 --decay 1
	$(PY) distill.py $Q/teacher --guide $Q/one-call-1 --out $Q/one-call --iters 700 --decay 1
	$(PY) bench.py quality $Q/teacher $Q/student $Q/position $Q/one-call --method ddim \
	  --nfe 1 4 50 --rows 500 --seeds 2 --out assets/dates-diffuseq.json --overwrite

# real pairs: questions asked twice on Quora, both methods and an autoregressive model. The figures
# of the page are of another cut of the same questions (--input)
K = out/qqp-diffuseq
qqp: data/qqp
	$(PY) train_teacher.py --data data/qqp --model diffuseq --iters 8000 --eval-every 2000
	$(PY) distill.py $K/teacher --iters 800 --eval-every 100 --decay 0.9
	$(PY) distill.py $K/teacher --no-row-noise --out $K/position --iters 800 --eval-every 100 \
	  --decay 0.9
	$(PY) distill.py $K/teacher --guide $K/student --out $K/one-call-1 --iters 400 --decay 1
	$(PY) distill.py $K/teacher --guide $K/one-call-1 --out $K/one-call --iters 400 --decay 1
	$(PY) train_teacher.py --data data/qqp --axis loss --channels 8 --stagger 0 --batch 64 \
	  --iters 2000 --eval-every 500
	$(PY) distill.py out/qqp/teacher --noise-values 0 --lessons 6000 --iters 900 --eval-every 450
	$(PY) train_teacher.py --data data/qqp --model ar --batch 64 --iters 1500 --eval-every 500
	$(PY) bench.py quality $K/teacher $K/student $K/position $K/one-call out/qqp/teacher \
	  out/qqp/student out/qqp-ar/teacher --nfe 1 10 50 --rows 500 --out assets/qqp.json --overwrite
	$(PY) bench.py quality $K/teacher --clamp --nfe 10 50 --rows 500 --out assets/qqp-clamp.json \
	  --overwrite

speed: .venv
	$(PY) bench.py speed student,32,2048,128@1,4 flm,32,2048,128@8,64 mdlm,32,2048,128@8,64 \
	  ar,32,2048,128 diffuseq,32,2048,128@50 --batch 1 64 --out assets/speed.json --overwrite

# teacher and student of 30M parameters on one GPU: TEXT is a text file of yours; TINY=1 rehearses it
# all in a minute, on a CPU too. Each gets ten minutes: Ctrl-C, which `timeout` sends, saves
G = out/gpu
ifdef TINY
  GPU_DATA = --tokenizer bpe:300 --length 16
  GPU_SIZE = --preset laptop --layers 1 --heads 2 --width 32 --channels 32 --batch 4 --iters 4
  GPU_STUDENT = --preset laptop --batch 4 --iters 4
  GPU_ROWS = --rows 20
else
  GPU_DATA = --tokenizer bpe:8192 --length 128
  GPU_SIZE = --layers 6 --heads 8 --width 512 --channels 512 --batch 256 --eval-every 500
  GPU_STUDENT = --batch 256 --eval-every 500
endif
gpu: .venv
	$(PY) prepare_data.py gpu --input $(TEXT) $(GPU_DATA)
	-timeout -s INT 600 $(PY) train_teacher.py --data data/gpu --out $G/teacher $(GPU_SIZE)
	-timeout -s INT 600 $(PY) distill.py $G/teacher $(GPU_STUDENT)
	$(PY) bench.py quality $G/student $G/teacher --nfe 1 2 4 8 32 $(GPU_ROWS) \
	  --out $(if $(TINY),out,assets)/gpu-quality.json --overwrite
	$(PY) sample.py $G/student -n 8

.PHONY: demo test slow lint stories short pydocs dates dates-diffuseq qqp speed weights gpu
