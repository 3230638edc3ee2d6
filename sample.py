"""
Write text with a trained model, in one network call by default.

    python sample.py                            # 8 texts of the newest student
    python sample.py --prompt "Nora has" -n 20
    python sample.py --infill "Nora has _ _ books. She gives _ to Ben. Now she has _ books."
    python sample.py assets/dates-one-call.pt --source 2024-02-29
    python sample.py assets/stories-teacher.pt --nfe 64 --watch
    python sample.py assets/stories-student.pt --compare assets/stories-teacher.pt

Texts go to stdout, one a line; with --compare each model's figures, too. Otherwise figures that
tell text from noise go to stderr.
"""

import html
import os
import re
import shutil
import signal
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# before torch, which takes seconds to load: Ctrl-C is one line from here on
from prepare_data import (Parser, encode, fail, make_encoding, run_script, split_rows, to_texts,
                          write_whole)
from prepare_data import fraction as share
from prepare_data import nonnegative as rate
from prepare_data import nonnegative_int as count
from prepare_data import positive_int as positive
from prepare_data import sanity_metrics as health

import torch

from model import (STUDENTS, is_student, load, newest_checkpoints, pick_device, round_weights,
                   save, write_rows)

# the weights that come with this file
SHIPPED = Path(__file__).parent / 'assets/stories-student.pt'

# network calls of a teacher or of MDLM, unless --nfe says otherwise
TEACHER_CALLS = 64

# rows of a health line under --compare: fewer would not tell the models apart
COMPARED_ROWS = 256

# rows of a frame of --watch and --film; most columns of a film, and its pixels for a line and a
# character
FRAME_ROWS = 8
FILM_ROWS = 6
FILM_COLUMNS = 100
FILM_LINE = 21
FILM_CHARACTER = 8

# in --infill; it takes the space before it along, as a word's token does
HOLE = r' ?(?<!\\)_'

# what each kind of model lets one choose of its sampler, and whom each choice is for
SAMPLER_OPTIONS = {
    'flm': ['temperature', 'gamma'],
    'diffuseq': ['method', 'clamp'],
    'mdlm': ['temperature'],
    'ar': ['temperature'],
}
FOR_WHOM = {
    'temperature': 'flows, MDLM and autoregressive models',
    'gamma': 'flows',
    'method': 'diffusions',
    'clamp': 'diffusions',
}


# what makes a difference to texts only
WRITING = ['n', 'prompt', 'infill', 'source', 'nfe', 'temperature', 'gamma', 'method', 'clamp',
           'mbr', 'watch']


def parse(argv=None):
    """The options of a command line: a Namespace. What is not given is None."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    # which model
    add('checkpoint', nargs='?', help='a .pt file, or the folder of model.pt; the newest student')
    add('--device', default='', help='cpu, cuda or mps; the best there is')
    # what to write
    add('-n', type=positive, help='rows to write, for each source [8]')
    add('--prompt', help='text to begin with')
    add('--infill', help='text with holes, one _ for each token to write; \\_ is a real underscore')
    add('--source', help='for models of pairs: the source; without it, each line on stdin is one')
    # how to write
    add('--nfe', type=positive,
        help='network calls [1; of a distilled MDLM what it has learnt; 64 if not a student]')
    add('--seed', type=count, default=0, help='of the noise')
    add('--temperature', type=rate, help='of predictions, all but diffusions: logits / T [1]')
    add('--gamma', type=share, help='flows: 0 follows the flow, up to 1 noise is added anew [0]')
    add('--method', choices=['ancestral', 'ddim'], help='diffusions: the sampler [ancestral]')
    add('--clamp', action='store_true', default=None,
        help='diffusions: each guess becomes the nearest embedding')
    add('--mbr', type=positive, help='write N rows, print the one most like the others')
    # what to show
    add('--watch', action='store_true', help='draw each network call in the terminal')
    add('--compare', metavar='TEACHER',
        help='its rows in 1 and 64 calls beside ours, from the same noise if both have any')
    add('--film', metavar='SVG', help='of --compare: draw the teacher\'s calls over our result')
    # the file itself
    add('--info', action='store_true', help='describe the checkpoint and stop')
    add('--export', metavar='FILE', help='write the averaged weights in half precision and stop')
    add('--overwrite', action='store_true', help='--export may replace a file')
    return parser.parse_args(argv)


# -----------------------------------------------------------------------------
# Checks: all of them before any work. First those that need no model

def check_ranges(options):
    """Stop at numbers that argparse's types let pass."""
    if options.n is not None and options.n > 10 ** 6:
        fail(f'-n {options.n}: must be from 1 to 1,000,000')
    if options.nfe is not None and options.nfe > 10 ** 5:
        fail(f'--nfe {options.nfe}: must be from 1 to 100,000')
    # each row is compared with each other
    if options.mbr is not None and not 2 <= options.mbr <= 1000:
        fail(f'--mbr {options.mbr}: must be from 2 to 1,000')
    if options.temperature is not None and not 0.01 <= options.temperature <= 100:
        fail(f'--temperature {options.temperature}: must be from 0.01 to 100')


def check_texts(options):
    """Stop at texts that are empty, no Unicode, or do not go together."""
    # a row begins with one of these, or with nothing
    given = [name for name in ('prompt', 'infill', 'source') if getattr(options, name) is not None]
    if len(given) > 1:
        fail(f'--{given[0]} and --{given[1]} do not go together; give one of them')
    for name in given:
        text = getattr(options, name)
        if not text.strip():
            fail(f'--{name} is empty; leave it out, or give a text')
        check_unicode(f'--{name}', text)
    if options.infill is not None and not re.search(HOLE, options.infill):
        fail('--infill has no hole; put a _ for each token that is to be written')


def check_unicode(where, text):
    """Stop at what the shell passed on but is no text: bytes that are not in its encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        fail(f'{where}: {text!r} is not text in UTF-8')


def check_together(options):
    """Stop at options that contradict each other, or that do nothing without another one."""
    if options.n is not None and options.mbr is not None:
        fail('-n and --mbr do not go together: --mbr prints one row for each source')
    if options.film is not None and options.compare is None:
        fail('--film draws what --compare shows; add --compare TEACHER')
    if options.overwrite and options.export is None:
        fail('--overwrite is for --export; add --export FILE')
    if options.info and options.export is not None:
        fail('--info and --export do not go together; run one after the other')
    if options.info or options.export is not None:
        for name in WRITING:
            if getattr(options, name):
                flag = '-n' if name == 'n' else f'--{name}'
                fail(f'{flag} is of no use to --info and --export, which write no text')
    # each of these shows or writes one model
    if options.compare is not None:
        for name in ('mbr', 'watch', 'info', 'export'):
            if getattr(options, name):
                fail(f'--compare and --{name} do not go together; run one after the other')


def check_files(options):
    """Stop at files that cannot be what --export and --film write."""
    for name, suffix in (('export', '.pt'), ('film', '.svg')):
        path = getattr(options, name)
        if path is None:
            continue
        # a slip such as `--film model.pt` would replace a model by a picture
        if Path(path).suffix != suffix:
            fail(f'--{name} {path}: the name must end in {suffix}')
        if os.path.isdir(path):
            fail(f'--{name} {path}: is a folder; give the name of a file')
    if options.export is not None and os.path.exists(options.export) and not options.overwrite:
        fail(f'--export {options.export}: the file exists; give another name, or add --overwrite')


# Then those that know the model

def check_model(options, kinds, pairs, path):
    """Stop at options that no model here heeds: kinds are config.model of all that will write."""
    # an option without effect would be taken for one that brings nothing
    for name in FOR_WHOM:
        heeded = any(name in SAMPLER_OPTIONS[kind] for kind in kinds)
        if getattr(options, name) is not None and not heeded:
            fail(f'--{name} is for {FOR_WHOM[name]}; {path} is of the kind {kinds[0]}')
    if options.nfe is not None and kinds[0] == 'ar':
        fail(f'--nfe: {path} is autoregressive, it takes one call for each token; leave --nfe out')
    if pairs and options.prompt is not None:
        fail(f'--prompt: {path} is a model of pairs; give it a --source')
    if pairs and options.infill is not None:
        fail(f'--infill: {path} is a model of pairs; give it a --source')
    if not pairs and options.source is not None:
        fail(f'--source: {path} is not a model of pairs; give it a --prompt or --infill')


def check_teacher(ours, teacher):
    """Stop at models of which the same noise cannot be shown."""
    if is_student(teacher.model.config):
        fail(f'--compare {teacher.path}: is a student; name a teacher or a baseline')
    if teacher.meta['tokenizer'] != ours.meta['tokenizer']:
        fail(f'--compare {teacher.path}: has another tokenizer than {ours.path}')
    # the noise has a vector for each position, and what is given stands at the same ones
    for name in ('length', 'kind', 'pairs'):
        if teacher.meta[name] != ours.meta[name]:
            fail(f'--compare {teacher.path}: {name} of its rows is {teacher.meta[name]}, '
                 f'that of {ours.path} is {ours.meta[name]}')


# -----------------------------------------------------------------------------
# The model

@dataclass
class Writer:
    """A model, the name of its checkpoint, and what is known of the data that it has learnt."""
    path: str
    model: torch.nn.Module
    meta: dict
    encoding: object
    data: str
    sdtt_calls: int     # calls that a distilled MDLM has learnt to write in; 0 of other models


def tell(message):
    """A line on stderr, where it does not mix with the texts."""
    print(message, file=sys.stderr, flush=True)


def newest_students():
    """The files that distill.py has written under out/, the newest one first."""
    # a folder that has no model.pt yet, of a run that was stopped early, is no model
    return newest_checkpoints(*[f'out/*/{name}/model.pt' for name in STUDENTS.values()])


def default_checkpoint():
    """The newest student under out/, else the shipped weights; a line says which."""
    found = newest_students()
    if found:
        tell(f'model: {found[0]}, the newest student')
        return found[0]
    if SHIPPED.is_file():
        tell(f'model: {SHIPPED}, which comes with this code')
    return SHIPPED


def make_writer(path, model, ckpt):
    """A Writer of what model.load returns."""
    meta = ckpt['meta']
    options = ckpt['options']
    # SDTT changes nothing in the network that would tell a student from its teacher
    sdtt_calls = options['fewest'] if options.get('stage') == 'masked' else 0
    model = round_weights(model)
    encoding = make_encoding(meta['tokenizer'])
    return Writer(str(path), model, meta, encoding, options['data'], sdtt_calls)


def role(writer):
    """What a model is to its reader: student, teacher, mdlm, sdtt (a distilled mdlm) or ar."""
    if writer.sdtt_calls:
        return 'sdtt'
    config = writer.model.config
    if config.model in ('mdlm', 'ar'):
        return config.model
    return 'student' if is_student(config) else 'teacher'


def network_calls(writer, nfe):
    """Calls that a model makes if --nfe is nfe, or None: those it was made for, 64 of teachers."""
    config = writer.model.config
    if config.model == 'ar':
        return config.length
    if nfe is not None:
        return nfe
    if writer.sdtt_calls:
        return writer.sdtt_calls
    return 1 if is_student(config) else TEACHER_CALLS


def sampler_options(config, options):
    """What the options say of this kind of model's sampler: a dict for model.sample."""
    how = {name: getattr(options, name) for name in SAMPLER_OPTIONS[config.model]}
    return {name: value for name, value in how.items() if value is not None}


def tell_what_is_not_said(writer, nfe, options):
    """Lines on a number of calls that was not asked for, and on options that change nothing."""
    config = writer.model.config
    if options.nfe is None and nfe > 1:
        name = role(writer) if writer.sdtt_calls else f'not a student but {role(writer)}'
        reason = 'one for each token' if config.model == 'ar' else '--nfe sets another number'
        tell(f'{name}: {nfe} network calls; {reason}')
    if nfe == 1 and config.model in ('flm', 'diffuseq'):
        for name in sampler_options(config, options):
            tell(f'--{name} changes nothing in a single call; it takes --nfe 2 or more')


def print_info(path, model, ckpt):
    """Describe a checkpoint on stdout."""
    meta = ckpt['meta']
    tokenizer = meta['tokenizer']
    parameters = sum(p.numel() for p in model.parameters())
    print(f'file: {path}')
    for name in ('iter', 'config', 'options', 'teacher'):
        print(f'{name}: {ckpt.get(name)}')
    pairs = ' of pairs' if meta['pairs'] else ''
    print(f'data: {meta["name"]}, {meta["kind"]} of {meta["length"]} tokens{pairs}')
    print(f'tokenizer: {tokenizer["name"]}, {meta["vocab"]:,} tokens')
    print(f'parameters: {parameters:,}')


def export(path, model, ckpt):
    """Write a checkpoint of the averaged weights only, in half precision."""
    # the axis of a flow and the bias of a diffusion are small, and stay in fp32
    model.net.half()
    # neither optimisers nor what only training needs
    kept = {name: ckpt[name] for name in ('iter', 'meta', 'options', 'teacher') if name in ckpt}
    # as weights and as their average the same tensors, which torch.save stores once
    save(path, model, model, **kept)
    tell(f'{path}: {os.path.getsize(path):,} bytes')


# -----------------------------------------------------------------------------
# What is known of a row


def read_sources(options, meta):
    """The sources to write for; of models without any, one that is empty."""
    if not meta['pairs']:
        return ['']
    if options.source is not None:
        return [options.source.strip()]
    if sys.stdin is None or sys.stdin.isatty():
        fail('this model writes from a source: give --source TEXT, or one per line on stdin')
    # UTF-8, also where the system has another encoding; Windows begins with a byte-order mark
    try:
        text = sys.stdin.buffer.read().decode('utf-8-sig')
    except UnicodeDecodeError:
        fail('stdin is not text in UTF-8')
    lines = re.split('\r\n|\r|\n', text)
    sources = [line.strip() for line in lines if line.strip()]
    if not sources:
        fail('stdin holds no source; give --source TEXT, or one per line on stdin')
    return sources


def known_ids(encoding, options, source, sep):
    """The ids that a row begins with, -1 for each hole of --infill."""
    if source:
        return encode(encoding, source) + [sep]
    if options.infill is None:
        # a space at the end would be a token of its own, as no text has it
        return encode(encoding, (options.prompt or '').rstrip(' '))
    # texts and holes by turns: the pattern in brackets keeps the holes
    ids = []
    for part in re.split(f'({HOLE})', options.infill.rstrip(' ')):
        if re.fullmatch(HOLE, part):
            ids.append(-1)
        else:
            ids.extend(encode(encoding, part.replace(r'\_', '_')))
    return ids


def known_row(meta, encoding, options, source=''):
    """What is known of a row: given (1, L), ids, and -1 at positions to be written."""
    length = meta['length']
    special = meta['special']
    # what the row begins with; all else is to be written
    ids = known_ids(encoding, options, source, special['<sep>'])
    if len(ids) >= length:
        fail(f'{source or options.prompt or options.infill!r:.60}: {len(ids)} tokens, but a row of '
             f'this model holds {length}, and one at least is to be written; shorten the text')
    rest = [-1] * (length - len(ids))
    if options.infill is not None and meta['kind'] == 'rows':
        # nothing comes behind the last word given
        rest = [special['<eos>']] + [special['<pad>']] * (len(rest) - 1)
    return torch.tensor([ids + rest])


def known_rows(writer, options, sources, n):
    """What is known of n rows for each source: given (B, L)."""
    rows = [known_row(writer.meta, writer.encoding, options, source) for source in sources]
    return torch.cat(rows).repeat_interleave(n, dim=0)


# -----------------------------------------------------------------------------
# Writing, choosing, printing

def timed_rows(model, given, nfe, seed, **how):
    """Rows for given (B, L) on the CPU, and the milliseconds of each; see model.write_rows."""
    # the first call of so many rows, 256 at a time, is slow, and says nothing of the others
    write_rows(model, given[:256], 1, seed)
    rows, seconds = write_rows(model, given, nfe, seed, **how)
    return rows, 1000 * seconds / len(rows)


def most_alike(texts):
    """
    Minimum Bayes risk: the index of the text, each a list of ids, that is most like the others.
    """
    # ours: likeness is the overlap of tokens and of pairs of neighbours, |a and b| / |a or b|;
    # DiffuSeq takes BLEU, which needs words and a library
    bags = [Counter(ids) + Counter(pairwise(ids)) for ids in texts]
    totals = []
    for a in bags:
        total = 0.0
        for b in bags:
            total += (a & b).total() / max(1, (a | b).total())
        totals.append(total)
    return totals.index(max(totals))


def choose_rows(rows, meta, n):
    """Of each n rows (B, L), which share a source, the one most like the others: (B/n, L)."""
    chosen = []
    for group in rows.split(n):
        texts = [ids for _, ids in split_rows(group, meta)]
        chosen.append(group[most_alike(texts)])
    return torch.stack(chosen)


def newline_mark():
    """How a line break is shown: by a sign if stdout's encoding has it, else as \\n."""
    try:
        '⏎'.encode(getattr(sys.stdout, 'encoding', None) or 'ascii')
        return '⏎'
    except (UnicodeEncodeError, LookupError):
        return '\\n'


def on_one_line(text):
    """A text as one line of a terminal: line breaks marked, what cannot be printed replaced."""
    text = text.replace('\r\n', '\n').replace('\r', '\n')
    mark = newline_mark()
    letters = []
    for letter in text:
        if letter == '\n':
            letters.append(mark)
        elif letter.isspace():
            letters.append(' ')
        # two signs without a width of their own, which Persian and emoji are written with
        elif letter.isprintable() or letter in '\u200c\u200d':
            letters.append(letter)
        else:
            letters.append('\ufffd')
    return ''.join(letters)


def print_texts(rows, writer):
    """Rows (B, L) on stdout, each on a line; of pairs, the source before the text."""
    for source, text in to_texts(rows, writer.meta, writer.encoding):
        # several rows may be of one source, and several sources on stdin
        if source:
            text = f'{source} -> {text}'
        print(on_one_line(text))
    # before the figures on stderr
    sys.stdout.flush()


def health_line(writer, rows, nfe, ms, seed):
    """
    Figures that tell text from noise, and how the rows were made; ms: of each row that was written,
    None where it was not timed.
    """
    parts = []
    for name, value in health(rows, writer.meta, writer.data).items():
        parts.append(f'{name} {value:.3f}')
    made = [f'nfe {nfe}']
    if ms is not None:
        made.append(f'{ms:.2f} ms per row')
    device = next(writer.model.parameters()).device
    made += [f'seed {seed}', f'{device}']
    return f'{len(rows)} rows: {", ".join(parts)}; {", ".join(made)}'


# -----------------------------------------------------------------------------
# What each network call would write: in a terminal, or as a film

def frame_texts(tokens, given, writer):
    """The first rows as they are after a call, tokens and given (B, L): a list of texts."""
    # a call of an autoregressive model shows what it has written, not yet what is given further on
    tokens = tokens[:FRAME_ROWS].cpu()
    # of a large vocabulary fewer rows than that are written at a time
    known = given[:len(tokens)]
    rows = torch.where(known < 0, tokens, known)
    # <bos> stands where an autoregressive model has not written yet
    texts = [text.replace('<bos>', '') for _, text in to_texts(rows, writer.meta, writer.encoding)]
    return [on_one_line(text) for text in texts]


def frames_kept(given, writer):
    """An on_call for model.sample, and the list of frames that it will fill."""
    frames = []

    def on_call(i, tokens):
        # rows are written at most 256 at a time: further ones begin with call 0 again
        if i == len(frames):
            frames.append(frame_texts(tokens, given, writer))

    return on_call, frames


def fit(text, columns):
    """The beginning of a text that fits so many columns of a terminal."""
    used = 0
    for i, letter in enumerate(text):
        # Chinese, Japanese and Korean letters take two
        used += 2 if unicodedata.east_asian_width(letter) in 'WF' else 1
        if used > columns:
            return text[:i]
    return text


def frames_drawn(given, writer, nfe):
    """An on_call for model.sample that draws in the terminal, each frame over the one before."""
    heights = []

    def on_call(i, tokens):
        # only the first rows, see frames_kept
        if i != len(heights):
            return
        columns, lines = shutil.get_terminal_size()
        texts = [f'call {i + 1} of {nfe}', *frame_texts(tokens, given, writer)]
        # a frame higher than the terminal would scroll, a line as wide as it would wrap
        texts = [fit(text, columns - 1) for text in texts[:max(1, lines - 1)]]
        print(erased(heights) + '\n'.join(texts), flush=True)
        heights.append(len(texts))
        time.sleep(0.05)
        # the texts themselves are printed next, in the same place
        if i == nfe - 1:
            print(erased(heights), end='', flush=True)

    return on_call


def erased(heights):
    """The control characters that erase the last frame drawn, if there is one."""
    return f'\033[{heights[-1]}A\033[J' if heights else ''


def film(many, few, names):
    """
    An SVG that plays the frames of a teacher's many calls, lists of texts, over what a student has
    written after its few; names: of the two. Returns the text of the file.
    """
    result = few[-1][:FILM_ROWS]
    # as wide as its longest text; the title needs 55 columns
    longest = 55
    for texts in [*many, result]:
        longest = max(longest, *map(len, texts))
    width = FILM_CHARACTER * min(FILM_COLUMNS, longest) + 24
    height = FILM_LINE * (2 * len(result) + 5)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             'font-family="monospace" font-size="13" fill="#e6edf3">',
             f'<rect width="{width}" height="{height}" rx="8" fill="#161b22"/>']
    last = len(many) - 1
    for i, texts in enumerate(many):
        # from when to when a frame is seen, as shares of ten seconds; the last one stays for two
        begin = 0.8 * i / last
        end = 1 if i == last else 0.8 * (i + 1) / last
        # the last one is also what is seen where nothing moves
        opacity = int(i == last)
        title = f'{names[0]}: call {i + 1} of {len(many)}'
        lines.append(
            f'<text y="10" opacity="{opacity}"><animate attributeName="opacity" dur="10s" '
            'repeatCount="indefinite" calcMode="discrete" values="0;1;0" '
            f'keyTimes="0;{begin:.4f};{end:.4f}"/>{film_lines([title, *texts[:FILM_ROWS]])}</text>')
    # what does not move stands below, after an empty line
    title = f'{names[1]}: call {len(few)} of {len(few)}'
    top = 10 + FILM_LINE * (len(result) + 2)
    lines.append(f'<text y="{top}">{film_lines([title, *result])}</text>')
    lines.append('</svg>')
    return '\n'.join(lines) + '\n'


def film_lines(texts):
    """Texts one under the other, as tspans of an SVG."""
    spans = []
    for text in texts:
        # an empty tspan would not move down
        line = html.escape(text[:FILM_COLUMNS]) or '&#160;'
        spans.append(f'<tspan x="12" dy="{FILM_LINE}">{line}</tspan>')
    return ''.join(spans)


# -----------------------------------------------------------------------------
# Teacher and student side by side

def share_noise(ours, teacher):
    """Whether both models start from the same noise of a seed, which the teacher then does."""
    a = ours.model.config
    b = teacher.model.config
    # tokens that are masked, or written one by one, have none
    if a.model != b.model or a.model not in ('flm', 'diffuseq') or a.channels != b.channels:
        return False
    # ours may be of few values, or one for all of a row
    if a.model == 'flm':
        teacher.model.values = ours.model.values
    else:
        b.row_noise = a.row_noise
    return True


def compare(ours, teacher, options):
    """The teacher's rows in 1 and 64 calls and ours under each other."""
    sources = read_sources(options, ours.meta)
    shown = options.n or 8
    # enough rows for a health line, whatever the number of sources
    n = max(shown, -(-COMPARED_ROWS // len(sources)))
    given = known_rows(ours, options, sources, n)
    # which model writes, in how many calls; autoregressive ones have no choice
    runs = [(teacher, 1), (teacher, TEACHER_CALLS)]
    if teacher.model.config.model == 'ar':
        runs = [(teacher, teacher.model.config.length)]
    runs.append((ours, network_calls(ours, options.nfe)))
    same_noise = share_noise(ours, teacher)

    # one after the other; write_rows seeds the noise anew for each
    names = []
    texts = []
    frames = []
    for writer, nfe in runs:
        name = f'{role(writer)} {nfe:2d} |'
        how = sampler_options(writer.model.config, options)
        if options.film is not None:
            # looking at each call takes a little time, so only where a film asks for it
            how['on_call'], kept = frames_kept(given, writer)
            frames.append(kept)
        rows, ms = timed_rows(writer.model, given, nfe, options.seed, **how)
        # known words are looked up in our data for all; a film takes time of its own
        ms = None if options.film is not None else ms
        print(name, health_line(ours, rows, nfe, ms, options.seed), flush=True)
        names.append(name)
        texts.append(to_texts(rows, ours.meta, ours.encoding))
    print_groups(names, texts, len(given), n, shown)

    if options.film is not None:
        ours_is = role(ours) + (', from the same noise' if same_noise else '')
        drawn = film(frames[-2], frames[-1], [role(teacher), ours_is])
        write_whole(options.film, drawn.encode())
        tell(f'film: {options.film}')


def print_groups(names, texts, total, n, shown):
    """Row by row what each model wrote; of the n rows of each source the first so many."""
    for at in range(total):
        # rows of one source follow each other; the others were only written for the figures
        if at % n >= shown:
            continue
        print()
        source = texts[0][at][0]
        if source:
            print(on_one_line(source))
        for name, written in zip(names, texts, strict=True):
            print(name, on_one_line(written[at][1]))


# -----------------------------------------------------------------------------
# The script

def write(ours, options):
    """Write rows and print them, and what they are worth."""
    config = ours.model.config
    nfe = network_calls(ours, options.nfe)
    tell_what_is_not_said(ours, nfe, options)
    sources = read_sources(options, ours.meta)
    # all rows of all sources at once, those of a source next to each other
    n = options.mbr or options.n or 8
    given = known_rows(ours, options, sources, n)
    how = sampler_options(config, options)
    watched = options.watch and sys.stdout.isatty()
    if options.watch and not watched:
        tell('--watch draws in a terminal only; here the texts alone are printed')
    if watched:
        how['on_call'] = frames_drawn(given, ours, nfe)
    rows, ms = timed_rows(ours.model, given, nfe, options.seed, **how)
    if options.mbr is not None:
        rows = choose_rows(rows, ours.meta, n)
    print_texts(rows, ours)
    # frames rest for the eye: the time is not the model's
    tell(health_line(ours, rows, nfe, None if watched else ms, options.seed))


def main(options):
    """Do what the options ask for."""
    # what can be wrong without a model, before one is loaded
    check_ranges(options)
    check_texts(options)
    check_together(options)
    check_files(options)

    # the file itself
    device = pick_device(options.device)
    path = options.checkpoint
    if path is None:
        path = default_checkpoint()
    model, ckpt = load(path, device)
    if options.info:
        print_info(path, model, ckpt)
        return
    if options.export is not None:
        export(options.export, model, ckpt)
        return

    # its texts, alone or beside those of a teacher
    ours = make_writer(path, model, ckpt)
    kinds = [model.config.model]
    if options.compare is None:
        check_model(options, kinds, ours.meta['pairs'], path)
        write(ours, options)
        return
    teacher = make_writer(options.compare, *load(options.compare, device))
    check_teacher(ours, teacher)
    kinds.append(teacher.model.config.model)
    check_model(options, kinds, ours.meta['pairs'], path)
    compare(ours, teacher, options)


if __name__ == '__main__':
    # a reader that stops, such as `| head`, ends this script without a word
    if hasattr(signal, 'SIGPIPE'):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    run_script(lambda: main(parse()))
