"""
Write text with a trained model, in one network call by default.

    python sample.py                            # 8 texts of the newest model in out/
    python sample.py --prompt "Nora has" -n 20
    python sample.py --infill "Nora has _ _ books. She gives _ to Ben. Now she has _ books."
    python sample.py assets/dates-one-call.pt --source 2024-02-29
    python sample.py assets/stories-teacher.pt --nfe 64 --watch
    python sample.py assets/stories-student.pt --compare assets/stories-teacher.pt

Texts go to stdout as they are written, one a line. Everything else goes to stderr: which model
writes, how long it will take, and sanity metrics, which tell text from noise.
"""

import html
import json
import logging
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

# before torch, which takes seconds to load: Ctrl-C is one line from here on
from prepare_data import (SPECIAL, UNSPACED, Parser, check_output, encode, fail, fraction,
                          make_encoding, make_tokenizer, need, nonnegative_int, number, run_script,
                          sanity_metrics, say, tell, to_texts, write_whole)

import numpy as np
import torch
import torch.nn.functional as F

from model import (MODELS, Config, build, load, newest_checkpoint, pick_device, reparameterization,
                   round_weights, save, sample_batches, sample_rows)
from train_teacher import as_flag, difference, refuse_unused

# the weights that come with this code
SHIPPED = Path(__file__).parent / 'assets/stories-student.pt'

# network calls of a model that was not distilled
TEACHER_CALLS = 64

# -----------------------------------------------------------------------------
# Options

def models_with(option):
    """The kinds of model whose sampler takes an option."""
    return [name for name, model in MODELS.items() if option in model.sampler_options]


# the kinds of model that an option of samplers is for
ONLY_FOR = {
    'temperature': models_with('temperature'),
    'gamma': models_with('gamma'),
    'method': models_with('method'),
    'clamp': models_with('clamp'),
}

# likewise; an autoregressive model makes one call for each token
NFE_FOR = {'nfe': ['flm', 'diffuseq', 'mdlm']}

# the kinds of data that a given text is for
GIVEN_FOR = {
    'prompt': ['models of text'],
    'infill': ['models of text'],
    'source': ['models of pairs'],
}


def add_sampler_options(add):
    """The options of samplers, which bench.py has, too."""
    add('--temperature', type=number(float, 0, 100),
        help='flm, mdlm, ar: logits / T; 0: greedy decoding [1]')
    add('--gamma', type=fraction,
        help='flm: fresh noise after each call; 0: none, 1: as much as the time allows [0, but 1 '
             'if all jumps of a student have to end at t = 1]')
    add('--method', choices=['ancestral', 'ddim'], help='diffuseq: the sampler [ancestral]')
    add('--clamp', action='store_true', default=None,
        help='diffuseq: snap predictions to the nearest embedding')


def parse(argv=None):
    """The options of a command line; what is not given is None."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    # which model
    add('checkpoint', nargs='?',
        help='a .pt file, or the folder of a model.pt; default: the newest in out/, else the '
             'weights that come with this code')
    add('--official', metavar='NAME',
        help=f'weights that the authors of the paper publish: {", ".join(PUBLISHED)}, or a file')
    add('--device', default='', help='cpu, cuda or mps; default: the best there is')
    # what to write
    add('-n', type=number(int, 1, 1_000_000), help='texts, for each source [8]')
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of('--prompt', help='the beginning of each text')
    one_of('--infill', help='a text with holes, one _ for each token; \\_ is a real underscore')
    one_of('--source', help='models of pairs: the source; default: each line of stdin is one')
    # how to write
    add('--nfe', type=number(int, 1, 100_000),
        help='network calls; default: those the model was distilled for, 64 if it was not')
    add('--seed', type=nonnegative_int, default=0, help='of the noise')
    add_sampler_options(add)
    # what to show, or to do with the model
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of('--mbr', type=number(int, 2, 1000), metavar='N',
           help='minimum Bayes risk: each text [1] is the one of N that is most like the others, '
                'by BLEU')
    one_of('--watch', action='store_true', help='draw each network call in the terminal')
    one_of('--compare', metavar='TEACHER',
           help='its texts in 1 and 64 calls beside ours, from the same noise if both have any')
    one_of('--info', action='store_true', help='describe the checkpoint and stop')
    one_of('--export', metavar='FILE', help='write the averaged (EMA) weights in half precision')
    add('--film', metavar='SVG', help="--compare: draw the teacher's calls above our texts")
    add('--overwrite', action='store_true', help='--film and --export may replace a file')
    return parser.parse_args(argv)


def check_options(options):
    """Reject invalid options before a model is loaded."""
    if options.official is not None and options.checkpoint is not None:
        fail(f'--official {options.official} and {options.checkpoint}: name one of them')
    if options.film is not None and options.compare is None:
        fail('--film draws what --compare shows; add --compare TEACHER')
    if options.mbr is not None:
        need('nltk', '--mbr')
    if options.export is not None:
        check_output('--export', options.export, '.pt', options.overwrite)
    if options.film is not None:
        check_output('--film', options.film, '.svg', options.overwrite)


def refuse_sampler_options(options, models, name):
    """Stop at an option of samplers that none of these models takes: it would change nothing."""
    only_for = dict(ONLY_FOR)
    for model in models:
        for option in model.sampler_options:
            only_for.pop(option, None)
    refuse_unused(options, only_for, None, name)


def sampler_options(model, options):
    """What the options say of a model's sampler: the arguments of its sample()."""
    how = {}
    for name in model.sampler_options:
        value = getattr(options, name)
        if value is not None:
            how[name] = value
    # greedy decoding is the limit of low temperatures
    if how.get('temperature') == 0:
        how['temperature'] = 1e-9
    return how


# -----------------------------------------------------------------------------
# The model

@dataclass
class Writer:
    """A model, its file, and what is known of the data that it was trained on."""
    path: str
    model: torch.nn.Module
    meta: dict
    data: str           # their folder
    encoding: object


def default_checkpoint():
    """The newest model in out/, teacher or student, else the shipped weights; a line says which."""
    newest = newest_checkpoint(lambda config: True)
    if newest is None:
        tell(f'model: {SHIPPED}, which comes with this code')
        return SHIPPED
    tell(f'model: {newest}, the newest in out/')
    return newest


def make_writer(path, model, ckpt):
    """A Writer of what load returns."""
    meta = ckpt['meta']
    encoding = make_encoding(meta['tokenizer'])
    model = round_weights(model)
    return Writer(str(path), model, meta, ckpt['data'], encoding)


def role(config):
    """What a model is called beside others."""
    if config.model == 'ar':
        return 'AR'
    if config.model == 'mdlm':
        return 'SDTT' if config.calls > 0 else 'MDLM'
    return 'student' if config.calls > 0 else 'teacher'


def network_calls(config, nfe):
    """Network calls of a model's sampler, where --nfe is nfe, or None."""
    # a baseline that writes one token in each call, whatever is asked for
    if config.model == 'ar':
        return config.length
    return nfe or config.calls or TEACHER_CALLS


def check_model(options, models, pairs, path):
    """Stop at options that have no effect on the models that will write, the first of them ours."""
    kind = models[0].config.model
    refuse_sampler_options(options, models, f'{path}, of the kind {kind}')
    refuse_unused(options, NFE_FOR, kind, f'{path}, of the kind {kind}')
    data = 'models of pairs' if pairs else 'models of text'
    if models[0].config.network == 'paper':
        data = 'models trained without given tokens'
    refuse_unused(options, GIVEN_FOR, data, f'{path}, one of the {data}')


# -----------------------------------------------------------------------------
# What is given

# a hole of --infill; it includes the space before it, as a word's token does
HOLE = r' ?(?<!\\)_'


def given_texts(options, pairs):
    """What to begin with, or the sources to write for: [(where it is from, text)]."""
    for name in ('prompt', 'infill', 'source'):
        if getattr(options, name) is not None:
            return [(as_flag(name), getattr(options, name))]
    if not pairs:
        return [('', '')]
    if sys.stdin is None or sys.stdin.isatty():
        fail('this model writes from a source: give --source TEXT, or one per line on stdin')
    # UTF-8 whatever the system's encoding is; files from Windows begin with a byte-order mark
    try:
        text = sys.stdin.buffer.read().decode('utf-8-sig')
    except UnicodeDecodeError:
        fail('stdin is not text in UTF-8')
    lines = re.split('\r\n|\r|\n', text)
    # a line break at the end begins no line
    if lines[-1] == '':
        lines.pop()
    if not lines:
        fail('stdin holds no source; give --source TEXT, or one per line on stdin')
    return [(f'stdin, line {i + 1}', line) for i, line in enumerate(lines)]


def known_ids(writer, where, text):
    """The ids that a row begins with, -1 for each hole of --infill."""
    if where == '':
        return []
    if not text.strip():
        fail(f'{where} is empty; leave it out, or give a text')
    if writer.meta['pairs']:
        return encode(writer.encoding, text.strip()) + [writer.meta['special']['<sep>']]
    # a space at the end would be a token of its own, as no training text has it
    text = text.rstrip(' ')
    if where == '--prompt':
        return encode(writer.encoding, text)
    if not re.search(HOLE, text):
        fail('--infill has no blank; put one _ for each token to generate')
    # texts and holes in turn: the pattern in brackets keeps the holes
    ids = []
    for part in re.split(f'({HOLE})', text):
        if re.fullmatch(HOLE, part):
            ids.append(-1)
        else:
            ids.extend(encode(writer.encoding, part.replace(r'\_', '_')))
    return ids


def known_row(writer, where, text):
    """What is known of a row: given (1, L), ids, -1 where text is to be generated."""
    length = writer.meta['length']
    special = writer.meta['special']
    ids = known_ids(writer, where, text)
    if len(ids) >= length:
        fail(f'{where}: {len(ids)} tokens, but a row of this model holds {length}, at least one of '
             'which is to be generated; shorten the text')
    left = length - len(ids)
    rest = [-1] * left
    if where == '--infill' and writer.meta['kind'] == 'rows':
        # the text ends after the last word given
        rest = [special['<pad>']] * left
        rest[0] = special['<eos>']
    return torch.tensor([ids + rest])


def known_rows(writer, texts, n):
    """What is known of n rows for each of given_texts: given (B, L), rows of one text together."""
    rows = [known_row(writer, where, text) for where, text in texts]
    rows = torch.cat(rows)
    return rows.repeat_interleave(n, dim=0)


# -----------------------------------------------------------------------------
# Writing

def warm_up(model, given, nfe, seed):
    """One call, which is slower than those that follow; a line if all of them will take long."""
    part = given[:256]
    _, seconds = sample_rows(model, part, 1, seed)
    # an autoregressive model has made all of its calls
    if model.config.model != 'ar':
        seconds *= nfe
    seconds *= len(given) / len(part)
    if seconds > 10:
        left = timedelta(seconds=round(seconds))
        tell(f'{len(given):,} rows in {nfe} network calls: about {left}')


def timed_rows(model, given, nfe, seed, **how):
    """Rows for given (B, L) on the CPU, and milliseconds per row."""
    warm_up(model, given, nfe, seed)
    rows, seconds = sample_rows(model, given, nfe, seed, **how)
    ms = 1000 * seconds
    return rows, ms / len(rows)


def split_words(text):
    """A text's words, split at spaces; ours: each character of scripts without spaces is one."""
    return re.sub(UNSPACED, r' \g<0> ', text).split()


def bleu(text, reference):
    """Sentence BLEU (Papineni et al. 2002) with smoothing method 4, in [0, 1], as in DiffuSeq."""
    # optional, and slow to import
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    smoothing = SmoothingFunction().method4
    return sentence_bleu([split_words(reference)], split_words(text),
                         smoothing_function=smoothing)


def most_alike(texts):
    """
    Minimum Bayes risk as in DiffuSeq: the index of the text whose BLEU against the others, each a
    reference of its own, adds up to most.
    """
    sums = []
    for i, text in enumerate(texts):
        others = texts[:i] + texts[i + 1:]
        scores = [bleu(text, other) for other in others]
        sums.append(sum(scores))
    return sums.index(max(sums))


def best_rows(rows, n, meta, encoding=None):
    """Of each n rows (B, L), which share a source, the one most like the others: (B/n, L)."""
    texts = [text for _, text in to_texts(rows, meta, encoding)]
    best = []
    for start in range(0, len(rows), n):
        chosen = most_alike(texts[start:start + n])
        best.append(start + chosen)
    best = torch.tensor(best, dtype=torch.long)
    return rows[best]


def on_one_line(text):
    """A text as one line of a terminal: line breaks marked, what cannot be printed replaced."""
    text = re.sub('\r\n|\r|\n', '⏎', text)
    text = re.sub(r'\s', ' ', text)
    letters = []
    for letter in text:
        # two signs without a width of their own, which Persian and emoji are written with
        known = letter.isprintable() or letter in '\u200c\u200d'
        letters.append(letter if known else '\ufffd')
    return ''.join(letters)


def to_lines(rows, writer):
    """Rows (B, L) as [(source, text)], each on one line."""
    pairs = to_texts(rows, writer.meta, writer.encoding)
    return [(on_one_line(source), on_one_line(text)) for source, text in pairs]


def print_texts(rows, writer):
    """Rows (B, L) on stdout, each on a line; of pairs, the source before the text."""
    for source, text in to_lines(rows, writer):
        # several rows may be of one source, and several sources on stdin
        print(f'{source} -> {text}' if source else text)
    sys.stdout.flush()


def sanity_line(writer, rows, nfe, ms, seed):
    """Sanity metrics of rows, and how they were made; ms per row, None where it was not timed."""
    metrics = sanity_metrics(rows, writer.meta, writer.data)
    parts = [f'{name} {value:.3f}' for name, value in metrics.items()]
    made = [f'nfe {nfe}']
    if ms is not None:
        made.append(f'{ms:.2f} ms per row')
    device = next(writer.model.parameters()).device
    made += [f'seed {seed}', str(device)]
    return f'{len(rows)} rows: {", ".join(parts)}; {", ".join(made)}'


def best_as_written(parts, n, writer):
    """The best of each n rows, as soon as these are there: (rows, seconds), see sample_batches."""
    pending = torch.empty(0, writer.meta['length'], dtype=torch.long)
    for rows, seconds in parts:
        rows = torch.cat([pending, rows])
        whole = len(rows) // n * n
        pending = rows[whole:]
        best = best_rows(rows[:whole], n, writer.meta, writer.encoding)
        yield best, seconds


def write(writer, options):
    """Write rows, print each as soon as it is there, and at the end the sanity metrics of all."""
    model = writer.model
    config = model.config
    nfe = network_calls(config, options.nfe)
    how = sampler_options(model, options)
    # the text of a flow or a diffusion is the argmax of its last call
    if nfe == 1 and config.model in ('flm', 'diffuseq'):
        for name in how:
            tell(f'{as_flag(name)} has no effect in a single call; it takes --nfe 2 or more')

    # what is known of the rows, those of a source together
    texts = given_texts(options, writer.meta['pairs'])
    candidates = options.mbr or 1
    n = options.n or (1 if options.mbr else 8)
    given = known_rows(writer, texts, n * candidates)

    watched = options.watch and sys.stdout.isatty()
    if watched:
        how['on_call'] = watcher(given, writer, nfe)
    elif options.watch:
        tell('--watch draws in a terminal only; here the texts alone are printed')

    warm_up(model, given, nfe, options.seed)
    parts = sample_batches(model, given, nfe, options.seed, **how)
    if options.mbr:
        parts = best_as_written(parts, candidates, writer)
    written = []
    total = 0.0
    for rows, seconds in parts:
        print_texts(rows, writer)
        written.append(rows)
        total += seconds
    # frames rest for the eye, so their time is not the model's
    ms = None if watched else 1000 * total / len(given)
    rows = torch.cat(written)
    tell(sanity_line(writer, rows, nfe, ms, options.seed))


# -----------------------------------------------------------------------------
# What each network call would write: in a terminal, or as a film

# rows of a frame; columns of a film, and its pixels for a line and a character
FRAME_ROWS = 12
FILM_COLUMNS = 90
FILM_LINE = 21
FILM_CHARACTER = 8


def frame_keeper(given, keep):
    """An on_call for model.sample that hands the first rows of each call to keep()."""
    calls = []

    def on_call(i, tokens):
        # rows are written at most 256 at a time: further ones begin with call 0 again
        if i != len(calls):
            return
        calls.append(i)
        tokens = tokens[:FRAME_ROWS].cpu()
        # an autoregressive model has not yet reached what is given further on
        known = given[:len(tokens)]
        keep(torch.where(known < 0, tokens, known))

    return on_call


def frame_texts(rows, writer):
    """The texts of a frame's rows (n, L)."""
    # <bos> stands where an autoregressive model has not written yet
    return [text.replace('<bos>', '') for _, text in to_lines(rows, writer)]


def watcher(given, writer, nfe):
    """An on_call for model.sample that draws in the terminal, each frame over the one before."""
    heights = [0]  # of the frames so far, in lines

    def draw(rows):
        frame = [f'call {len(heights)} of {nfe}', *frame_texts(rows, writer)]
        # a frame higher than the terminal would scroll
        lines = shutil.get_terminal_size().lines
        frame = frame[:max(1, lines - 1)]
        erase()
        # while it does not wrap, the terminal cuts lines that are too long
        print('\033[?7l' + '\n'.join(frame) + '\033[?7h', flush=True)
        heights.append(len(frame))
        time.sleep(0.05)
        # the texts themselves are printed next, in the same place
        if len(heights) > nfe:
            erase()

    def erase():
        # up by so many lines, then clear all below
        if heights[-1] > 0:
            print(f'\033[{heights[-1]}A\033[J', end='')

    return frame_keeper(given, draw)


def film_block(title, rows, writer):
    """A title and a frame's rows (n, L) as lines of an SVG; an x marks rows that are not valid."""
    lines = [title]
    for row, text in zip(rows, frame_texts(rows, writer)):
        # of most data it is not known
        metrics = sanity_metrics(row[None], writer.meta)
        marks = {None: '', 0: 'x ', 1: '\u00a0 '}
        lines.append(marks[metrics.get('valid')] + text)
    spans = []
    for line in lines:
        # an empty tspan would not move down
        line = html.escape(line[:FILM_COLUMNS]) or '&#160;'
        spans.append(f'<tspan x="12" dy="{FILM_LINE}">{line}</tspan>')
    return ''.join(spans)


def film(frames, rows, titles, writer):
    """
    The text of an SVG that plays the frames of a teacher, rows (n, L) of each call, above the rows
    that a student has written.
    """
    width = FILM_CHARACTER * FILM_COLUMNS + 24
    height = FILM_LINE * (2 * len(rows) + 5)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             'font-family="monospace" font-size="13" fill="#e6edf3">',
             f'<rect width="{width}" height="{height}" rx="8" fill="#161b22"/>']
    last = len(frames) - 1
    for i, frame in enumerate(frames):
        # when a frame is seen, as fractions of ten seconds; the last one stays for two
        begin = 0.8 * i / last
        end = 1 if i == last else 0.8 * (i + 1) / last
        # the last one is also what is seen where nothing moves
        opacity = int(i == last)
        block = film_block(f'{titles[0]}: call {i + 1} of {len(frames)}', frame, writer)
        lines.append(
            f'<text y="10" opacity="{opacity}"><animate attributeName="opacity" dur="10s" '
            'repeatCount="indefinite" calcMode="discrete" values="0;1;0" '
            f'keyTimes="0;{begin:.4f};{end:.4f}"/>{block}</text>')
    # what does not move stands below, after an empty line
    top = 10 + FILM_LINE * (len(rows) + 2)
    lines.append(f'<text y="{top}">{film_block(titles[1], rows, writer)}</text>')
    lines.append('</svg>')
    return '\n'.join(lines) + '\n'


# -----------------------------------------------------------------------------
# Teacher and student side by side

def share_noise(ours, teacher):
    """Let the teacher start from the noise that the student starts from; whether both have any."""
    a = ours.model.config
    b = teacher.model.config
    # tokens that are masked, or written one by one, have none
    if a.model != b.model or a.model not in ('flm', 'diffuseq') or a.channels != b.channels:
        return False
    if a.model == 'flm':
        # the student's noise may be quantized
        teacher.model.levels = ours.model.levels
    else:
        b.shared_noise = a.shared_noise
    return True


def compare(ours, teacher, options):
    """The teacher's rows in 1 and 64 calls and ours under each other."""
    texts = given_texts(options, ours.meta['pairs'])
    shown = options.n or 8
    # fewer than 256 rows would not tell the models apart
    n = max(shown, 256 // len(texts))
    given = known_rows(ours, texts, n)
    same_noise = share_noise(ours, teacher)

    # which model writes, in how many calls; for an autoregressive one the first two are the same
    few = network_calls(teacher.model.config, 1)
    many = network_calls(teacher.model.config, TEACHER_CALLS)
    runs = [(teacher, nfe) for nfe in sorted({few, many})]
    nfe = network_calls(ours.model.config, options.nfe)
    runs.append((ours, nfe))

    # one after the other; the noise is seeded anew for each
    names = []
    columns = []
    frames = []
    for writer, nfe in runs:
        name = f'{role(writer.model.config)} {nfe:2d} |'
        how = sampler_options(writer.model, options)
        frames.append([])
        if options.film is not None:
            how['on_call'] = frame_keeper(given, frames[-1].append)
        rows, ms = timed_rows(writer.model, given, nfe, options.seed, **how)
        # looking at each call takes time of its own
        if options.film is not None:
            ms = None
        # words are looked up in our data for all
        say(f'{name} {sanity_line(ours, rows, nfe, ms, options.seed)}')
        names.append(name)
        columns.append(to_lines(rows, ours))

    if options.film is not None:
        title = f'{role(ours.model.config)}: call {nfe} of {nfe}'
        if same_noise:
            title += ', from the same noise'
        titles = [role(teacher.model.config), title]
        drawn = film(frames[-2], frames[-1][-1], titles, ours)
        write_whole(options.film, drawn.encode())
        tell(f'film: {options.film}')
    print_side_by_side(names, columns, n, shown)


def print_side_by_side(names, columns, n, shown):
    """Row by row what each model wrote; of the n rows of each source the first so many."""
    for at, (source, _) in enumerate(columns[0]):
        # rows of one source follow each other; the others were only written for the metrics
        if at % n >= shown:
            continue
        say('')
        if source:
            say(source)
        for name, lines in zip(names, columns):
            say(f'{name} {lines[at][1]}')


# -----------------------------------------------------------------------------
# The file itself

def print_info(path, model, ckpt):
    """Describe a checkpoint on stdout."""
    meta = ckpt['meta']
    parameters = sum(p.numel() for p in model.parameters())
    say(f'file: {path}')
    for name in ('iter', 'config', 'options', 'parents'):
        say(f'{name}: {ckpt.get(name)}')
    pairs = ' of pairs' if meta['pairs'] else ''
    say(f'data: {meta["name"]}, {meta["kind"]} of {meta["length"]} tokens{pairs}')
    say(f'tokenizer: {meta["tokenizer"]["name"]}, {meta["vocab"]:,} tokens')
    say(f'parameters: {parameters:,}')


def export(path, model, ckpt):
    """Write a checkpoint of the averaged weights only, in half precision."""
    # tau(t) of a flow and the bias of a diffusion are small, and stay in fp32
    model.net.half()
    kept = {}
    for name in ('iter', 'seconds', 'meta', 'data', 'options', 'parents'):
        if name in ckpt:
            kept[name] = ckpt[name]
    save(path, {'ema': model}, **kept)
    tell(f'{path}: {os.path.getsize(path):,} bytes')


# -----------------------------------------------------------------------------
# The weights that the authors of FLM and FMLM publish: huggingface.co/david3684

# prefixes of the pinned commits
PUBLISHED = {
    'FLM-B-LM1B': 'cd0ca433',
    'FMLM-B-LM1B': '356592ce',
    'FLM-B-OWT': '624471b9',
    'FMLM-B-OWT': '483ea1b3',
}

# their vocabularies: tokenizer and length of rows, and how many of our four special tokens are new
PUBLISHED_VOCAB = {
    30_522: ('bert', 128, 4),
    # GPT-2's <|endoftext|> and a [PAD] serve as <eos> and <pad>
    50_258: ('gpt2', 1024, 2),
}

# parts of a block, as they and as we call them
PUBLISHED_NAMES = {
    'norm1.weight': 'norm1',
    'attn_qkv.weight': 'qkv.weight',
    'attn_out.weight': 'out.weight',
    'norm2.weight': 'norm2',
    'mlp.0.weight': 'up.weight',
    'mlp.0.bias': 'up.bias',
    'mlp.2.weight': 'down.weight',
    'mlp.2.bias': 'down.bias',
}


def published(name):
    """The checkpoint of published weights, which are fetched and converted once: its path."""
    file = Path(name)
    folder = Path('out') / (file.resolve().parent.name if file.suffix else name)
    if os.path.isfile(folder / 'model.pt'):
        tell(f'{folder}/model.pt: converted before')
        return folder / 'model.pt'
    if not file.suffix:
        if name not in PUBLISHED:
            names = ', '.join(PUBLISHED)
            fail(f'--official {name}: must be a .safetensors file, or one of {names}')
        file = fetch(f'david3684/{name}', 'model.safetensors', PUBLISHED[name])
    theirs = read_safetensors(file)
    if 'vocab_embed.embedding' not in theirs:
        fail(f'{file} is not of FLM or FMLM')
    vocab = len(theirs['vocab_embed.embedding'])
    if vocab not in PUBLISHED_VOCAB:
        fail(f'{file}: a vocabulary of {vocab:,} tokens, which none of the published models has')
    how, length, new = PUBLISHED_VOCAB[vocab]
    if how == 'bert':
        how = f'bert:{fetch("google-bert/bert-base-uncased", "vocab.txt")}'
    tokenizer = make_tokenizer(how, [])
    special = {name: vocab + new - 4 + i for i, name in enumerate(SPECIAL)}
    meta = {'name': folder.name, 'vocab': vocab + new, 'kind': 'stream', 'pairs': False,
            'length': length, 'special': special, 'tokenizer': tokenizer, 'crc': None}
    flow = from_published(theirs, length, new)
    save(folder / 'model.pt', {'ema': flow}, iter=0, meta=meta, data='', options={})
    tell(f'{folder}/model.pt: written, an ordinary checkpoint')
    return folder / 'model.pt'


def fetch(repo, name, commit=''):
    """A file of the Hugging Face hub, downloaded once: its path."""
    need('huggingface_hub', '--official')
    from huggingface_hub import HfApi, hf_hub_download
    tell(f'fetching {name} of {repo}')
    logging.disable()  # the client tells of each of its retries
    try:
        # the hub wants the whole name of a commit
        commits = [found.commit_id for found in HfApi().list_repo_commits(repo)]
        revision = next((found for found in commits if found.startswith(commit)), commit)
        return hf_hub_download(repo, name, revision=revision)
    except Exception as error:  # the hub's client raises dozens of kinds
        reason = ' '.join(str(error).split())[:200]
        fail(f'{repo} cannot be fetched ({type(error).__name__}: {reason}); check the network and '
             'the space on the disk, and try again')


def read_safetensors(path):
    """The tensors of a .safetensors file: a JSON header after its length, then the numbers."""
    dtypes = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
    tensors = {}
    try:
        data = np.memmap(path, np.uint8, 'r')
        start = 8 + int.from_bytes(data[:8].tobytes(), 'little')
        header = json.loads(data[8:start].tobytes())
        header.pop('__metadata__', None)
        for name, about in header.items():
            begin, end = about['data_offsets']
            numbers = torch.from_numpy(data[start + begin:start + end].copy())
            numbers = numbers.view(dtypes[about['dtype']])
            tensors[name] = numbers.view(about['shape']).float()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        fail(f'{path}: damaged, or not a .safetensors file; download it again')
    return tensors


def from_published(theirs, length, new):
    """
    A state dict of their class DIT -> OneHotFlow. `new` token ids are added after theirs: rows of
    0 in E, which add nothing to the noise, and a logit at the cap.
    """
    vocab, width = theirs['vocab_embed.embedding'].shape
    layers = sum(name.endswith('attn_qkv.weight') for name in theirs)
    try:
        half = len(theirs.pop('rotary_emb.inv_freq'))
        config = Config(
            vocab=vocab + new, length=length, layers=layers, heads=width // (2 * half), width=width,
            channels=width, network='paper', calls=int('sigma_map_prime.mlp.0.weight' in theirs),
            cond=len(theirs['sigma_map.mlp.0.weight']), dropout=0.1)
        flow = build(config)
        # a fresh bias holds the 1 of their 1 + scale
        fresh = flow.net.modulation.bias.detach()

        ours = {
            'embed': F.pad(theirs.pop('vocab_embed.embedding'), (0, 0, 0, new)),
            'norm': theirs.pop('output_layer.norm_final.weight'),
            'head.weight': F.pad(theirs.pop('output_layer.linear.weight'), (0, 0, 0, new)),
            'head.bias': F.pad(theirs.pop('output_layer.linear.bias'), (0, new), value=-1e4),
        }
        for i in range(layers):
            for their_name, name in PUBLISHED_NAMES.items():
                ours[f'blocks.{i}.{name}'] = theirs.pop(f'blocks.{i}.{their_name}')
        # one modulation for all blocks, and the head
        modules = [f'blocks.{i}' for i in range(layers)] + ['output_layer']
        for kind in ('weight', 'bias'):
            parts = [theirs.pop(f'{module}.adaLN_modulation.{kind}') for module in modules]
            ours[f'modulation.{kind}'] = torch.cat(parts)
        ours['modulation.bias'] += fresh
        for name in list(theirs):
            if name.startswith('sigma_map'):
                module, _, rest = name.split('.', 2)  # sigma_map . mlp . 0.weight
                time = 'time_to' if module.endswith('prime') else 'time'
                ours[f'{time}.{rest}'] = theirs.pop(name)
        # what is left weighs the training loss
        left = [name for name in theirs if not name.startswith('learnable_loss_weighting.')]
        if left:
            raise KeyError(left[0])
        flow.net.load_state_dict(ours)
    except (KeyError, RuntimeError) as error:
        fail(f'not a known FLM or FMLM checkpoint: {str(error)[:200]}')
    # tau(t) of their vocabulary, without the new ids
    _, taus = reparameterization(vocab)
    flow.taus.copy_(taus)
    return flow.eval()


# -----------------------------------------------------------------------------
# The script

def main(options):
    # what can be wrong without a model, before one is loaded
    check_options(options)
    device = pick_device(options.device)
    path = options.checkpoint
    if options.official is not None:
        path = published(options.official)
    elif path is None:
        path = default_checkpoint()
    model, ckpt = load(path, device)

    # the file itself
    if options.info:
        print_info(path, model, ckpt)
        return
    if options.export is not None:
        export(options.export, model, ckpt)
        return

    # its texts, alone or beside those of a teacher
    ours = make_writer(path, model, ckpt)
    if options.compare is None:
        check_model(options, [model], ours.meta['pairs'], path)
        write(ours, options)
        return
    other, other_ckpt = load(options.compare, device)
    teacher = make_writer(options.compare, other, other_ckpt)
    # the same noise can be shown, and the same text be given
    changed = difference(ours.meta, teacher.meta, ('tokenizer', 'length', 'kind', 'pairs'))
    if changed:
        fail(f'--compare {teacher.path} does not match {path}: it has {changed}')
    check_model(options, [model, other], ours.meta['pairs'], path)
    compare(ours, teacher, options)


if __name__ == '__main__':
    run_script(lambda: main(parse()))
