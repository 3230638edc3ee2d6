# make demo: text in one network call, from nothing, on a laptop
# make test: the tests; make slow: those that take long; make lint: the linter
# What the pages report, made anew: make captions, captions-two-hours, stories, short, dates,
# dates-diffuseq, qqp, qqp-words, speed; with a GPU: make gpu-speed, gpu-text; then make tables
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

data/captions: | .venv
	$(PY) prepare_data.py captions $(if $(CAPTIONS),--input $(CAPTIONS) --rows)

# the headline: captions from the Hugging Face hub, or lines of a file (CAPTIONS=captions.txt). Masked
# diffusion gets the minutes of teacher and student; the scorer is larger, and trained for longer
C = out/captions
captions: captions-0 captions-1 captions-2 $C-scorer/model.pt
	$(PY) bench.py quality $C-{seed}/teacher $C-{seed}/student $C-{seed}/mdlm $C-scorer \
	  --nfe 1 2 4 8 16 32 --seeds 3 --scorer $C-scorer --out assets/captions.json --overwrite
	$(PY) bench.py quality $C-{seed}/mdlm $C-scorer --temperature 0.5 --nfe 8 16 --seeds 2 \
	  --scorer $C-scorer --out assets/captions-cool.json --overwrite
	$(PY) bench.py quality $C-{seed}/mdlm --temperature 0.8 --nfe 2 4 8 16 --seeds 3 \
	  --scorer $C-scorer --out assets/captions-0.8.json --overwrite
	$(PY) bench.py quality $C-{seed}/mdlm --temperature 0.9 --nfe 2 4 8 16 --seeds 3 \
	  --scorer $C-scorer --out assets/captions-0.9.json --overwrite

# the same in two hours: a larger flow
captions-two-hours: data/captions $C-scorer/model.pt
	$(PY) train_teacher.py --data data/captions --layers 6 --heads 8 --width 128 --minutes 45 \
	  --out $C-two-hours/teacher
	$(PY) distill.py $C-two-hours/teacher --minutes 75
	$(PY) bench.py quality $C-two-hours/teacher $C-two-hours/student --nfe 1 2 8 32 --seeds 2 \
	  --scorer $C-scorer --out assets/captions-two-hours.json --overwrite

$C-scorer/model.pt: | data/captions
	$(PY) train_teacher.py --data data/captions --model ar --layers 6 --heads 6 --width 192 \
	  --dropout 0.1 --batch 64 --minutes 40 --seed 7 --out $C-scorer

captions-%: data/captions
	$(PY) train_teacher.py --data data/captions --out $C-$*/teacher --seed $*
	$(PY) distill.py $C-$*/teacher --seed $*
	$(PY) train_teacher.py --data data/captions --model mdlm --minutes 27 --out $C-$*/mdlm --seed $*

# the weights in assets/ are from the first two lines, an hour and a quarter of one core; masked
# diffusion is trained for as long as both, and then distilled; AR needs a quarter of an hour
S = out/stories
# the figures of stories are of batches of 128 rows, the weights, too
STORIES = --data data/stories --batch 128
stories: data/stories
	$(PY) train_teacher.py $(STORIES) --layers 6 --iters 2600
	$(PY) distill.py $S/teacher --reuse 3 --iters 8000 --evals 4
	$(PY) train_teacher.py $(STORIES) --model mdlm --layers 6 --iters 11500 --evals 5
	$(PY) distill.py $S-mdlm/teacher --out $S-mdlm/sdtt --iters 5000
	$(PY) train_teacher.py $(STORIES) --model ar --layers 6 --iters 2000
	$(PY) bench.py quality $S/teacher $S/student $S-mdlm/teacher $S-mdlm/sdtt $S-ar/teacher \
	  --nfe 1 2 4 8 32 64 --rows 500 --seeds 2 --out assets/stories.json --overwrite

# one network call beside its rivals, each trained three times: teacher 5 minutes and student 4; the
# same without stagger, by the paper's targets; masked diffusion 9, then distilled; AR 2.5
B = out/short
short: short-0 short-1 short-2
	$(PY) bench.py quality $B-{seed}/flow/teacher $B-{seed}/flow/student $B-{seed}/paper/teacher \
	  $B-{seed}/paper/student $B-{seed}/mdlm/teacher $B-{seed}/mdlm/sdtt $B-{seed}/ar/teacher \
	  --nfe 1 2 4 8 32 --rows 500 --seeds 3 --out assets/stories-short.json --overwrite

short-%: data/stories
	$(PY) train_teacher.py $(STORIES) --out $B-$*/flow/teacher --seed $*
	$(PY) distill.py $B-$*/flow/teacher --seed $*
	$(PY) train_teacher.py $(STORIES) --out $B-$*/paper/teacher --stagger 0 --seed $*
	$(PY) distill.py $B-$*/paper/teacher --method semigroup --diagonal 0.5 --boundary 0.03125 \
	  --noise-levels 0 --given 0 --seed $*
	$(PY) train_teacher.py $(STORIES) --model mdlm --out $B-$*/mdlm/teacher --minutes 9 \
	  --seed $*
	$(PY) distill.py $B-$*/mdlm/teacher --out $B-$*/mdlm/sdtt --seed $*
	$(PY) train_teacher.py $(STORIES) --model ar --out $B-$*/ar/teacher --minutes 2.5 \
	  --seed $*

weights:
	$(PY) sample.py out/stories/student --export assets/stories-student.pt --overwrite
	$(PY) sample.py out/stories/teacher --export assets/stories-teacher.pt --overwrite
	$(PY) sample.py out/dates/long --export assets/dates-one-call.pt --overwrite
	cd assets && sha256sum *.pt > SHA256SUMS
	$(PY) sample.py assets/stories-student.pt --compare assets/stories-teacher.pt \
	  --film assets/stories-film.svg --overwrite

# dates and Quora's questions, but for the flow of qqp-words, have networks of 4 x 128
PAIRS = --heads 8 --width 128

# a flow map whose targets are of eight calls, as are enough for eight minutes, and one of forty, with
# more and better targets, whose weights are in assets/
D = out/dates
DATES = --data data/dates $(PAIRS) --reparam root --batch 64
dates: data/dates
	$(PY) train_teacher.py $(DATES) --channels 1 --no-hidden-input --iters 1500 --decay 0.9
	$(PY) distill.py $D/teacher --noise-levels 4 --reuse 3 --iters 2000
	$(PY) distill.py $D/teacher --out $D/long --rollout 16 --noise-levels 3 --reuse 4 \
	  --iters 8000 --evals 4
	$(PY) train_teacher.py --data data/dates $(PAIRS) --model mdlm --batch 64 --iters 5000
	$(PY) bench.py quality $D/teacher $D/student $D/long $D-mdlm/teacher --nfe 1 2 4 8 32 \
	  --rows 500 --seeds 2 --out assets/dates.json --overwrite

# the other paper's pair: score distillation, with one noise for a row and with one for each position
# as in the paper; then the former refined twice
Q = out/dates-diffuseq
SID = --lr 3e-4 --fake-updates 1 --iters 400 --decay 0.9 --evals 4
dates-diffuseq: data/dates
	$(PY) train_teacher.py --data data/dates $(PAIRS) --model diffuseq --iters 1500 --decay 0.9
	$(PY) distill.py $Q/teacher $(SID)
	$(PY) distill.py $Q/teacher --no-shared-noise --out $Q/position $(SID)
	$(PY) distill.py $Q/teacher --reference $Q/student --out $Q/one-call-1 --iters 600 --decay 1
	$(PY) distill.py $Q/teacher --reference $Q/one-call-1 --out $Q/one-call --iters 700 --decay 1
	$(PY) bench.py quality $Q/teacher $Q/student $Q/position $Q/one-call --method ddim \
	  --nfe 1 4 50 --rows 500 --seeds 2 --out assets/dates-diffuseq.json --overwrite

# real pairs: questions asked twice on Quora, both methods and an autoregressive model; first by the
# defaults, of whole words, then of subwords
W = out/qqp-words
qqp-words: data/qqp
	$(PY) train_teacher.py --data data/qqp --out $W/teacher
	$(PY) distill.py $W/teacher
	$(PY) train_teacher.py --data data/qqp $(PAIRS) --model ar --minutes 8 --out $W/ar
	$(PY) bench.py quality $W/teacher $W/student $W/ar --nfe 1 4 10 --rows 500 \
	  --out assets/qqp-words.json --overwrite

data/subwords/qqp: | .venv
	$(PY) prepare_data.py qqp --data data/subwords --tokenizer bpe:2048 --length 40

K = out/qqp-diffuseq
qqp: data/subwords/qqp
	$(PY) train_teacher.py --data data/subwords/qqp $(PAIRS) --model diffuseq --iters 8000
	$(PY) distill.py $K/teacher $(SID)
	$(PY) distill.py $K/teacher --no-shared-noise --out $K/position $(SID)
	$(PY) distill.py $K/teacher --reference $K/student --out $K/one-call-1 --iters 400 --decay 1
	$(PY) distill.py $K/teacher --reference $K/one-call-1 --out $K/one-call --iters 400 --decay 1
	$(PY) train_teacher.py --data data/subwords/qqp $(PAIRS) --channels 8 --batch 64 --iters 2000
	$(PY) distill.py out/qqp/teacher --rollout 16 --noise-levels 0 --reuse 8 --iters 900
	$(PY) train_teacher.py --data data/subwords/qqp $(PAIRS) --model ar --batch 64 --iters 1500
	$(PY) bench.py quality $K/teacher $K/student $K/position $K/one-call out/qqp/teacher \
	  out/qqp/student out/qqp-ar/teacher --nfe 1 10 50 --rows 500 --out assets/qqp.json --overwrite
	$(PY) bench.py quality $K/teacher --clamp --nfe 10 50 --rows 500 --out assets/qqp-clamp.json \
	  --overwrite

speed: .venv
	$(PY) bench.py speed student,32,2048,128@1,4 flm,32,2048,128@8,64 mdlm,32,2048,128@8,64 \
	  ar,32,2048,128 diffuseq,32,2048,128@50 --batch 1 64 --out assets/speed.json --overwrite

# on a GPU, about three minutes: one call, its rivals, and a training iteration beside a plain GPT's
gpu-speed: .venv
	$(PY) bench.py speed student,128,50257,768@1 --layers 12 --batch 1 8 64 256 \
	  --out assets/gpu-call.json --overwrite
	$(PY) bench.py speed mdlm,128,50257,768@8,64 ar,128,50257,768 --layers 12 --batch 1 64 \
	  --out assets/gpu-samplers.json --overwrite
	$(PY) bench.py train 64,128,50257,768 --layers 12 --out assets/gpu-train.json --overwrite

# on a GPU, about 25 minutes: captions, and masked diffusion trained for as long
G = out/gpu
gpu-text: data/captions
	$(PY) train_teacher.py --data data/captions --minutes 4 --out $G/teacher
	$(PY) distill.py $G/teacher --minutes 4
	$(PY) train_teacher.py --data data/captions --model mdlm --minutes 8 --out $G/mdlm
	$(PY) train_teacher.py --data data/captions --model ar --dropout 0.1 --minutes 3 --out $G/ar
	$(PY) bench.py quality $G/teacher $G/student $G/mdlm $G/ar --nfe 1 2 4 8 16 32 64 \
	  --rows 1000 --scorer $G/ar --out assets/gpu-captions.json --overwrite
	$(PY) sample.py $G/student -n 20

tables: .venv
	$(PY) bench.py tables

.PHONY: demo test slow lint captions captions-two-hours stories short dates dates-diffuseq qqp \
	qqp-words weights speed gpu-speed gpu-text tables
