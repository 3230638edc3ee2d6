"""Write text with a trained model, in one network call by default.

    python sample.py                                          # out/pydocs/student, 8 sentences
    python sample.py --compare out/pydocs/teacher             # same noise: teacher and student
    python sample.py --infill "Return ____ of the file."      # one token for each _; or --prompt
    python sample.py out/dates/student --source 1987-03-23    # or one source per line on stdin
    python sample.py out/pydocs/teacher --nfe 64 --watch      # see it denoise
"""
import functools
import html
import math
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from prepare_data import date_forms, encode, fail, parse

@dataclass
class Options:
    checkpoint: str = 'out/pydocs/student'  # folder or .pt file; if missing, assets/'s
    nfe: int = 1                # network calls
    n: int = 8                  # rows to write (for each source)
    mbr: int = 0                # for each source: write the one of so many rows most like the rest
    seed: int = 0               # of the noise
    sampler: str = ''           # flm teachers: euler | ab2 | bridge; diffuseq: ancestral | ddim
    gamma: float = 0.0          # 0 follows the flow, 1 predicts the data and noises again
    temperature: float = 1.0    # of predictions; a flow gets there from 1, so one call stays
    prompt: str = ''            # text to begin with
    infill: str = ''            # text with holes, one _ per token
    source: str = ''            # for models of pairs: the source; without it, lines on stdin
    compare: str = ''           # a teacher: its rows at 1 and 64 calls beside ours, same noise
    film: str = ''              # of --compare: an animated SVG to write
    watch: bool = False         # animate the denoising in the terminal
    info: bool = False          # describe the checkpoint and stop
    export: str = ''            # write its averaged weights to this file, in half precision
    device: str = ''            # cpu, cuda or mps; default the best there is

OPTIONS = parse(Options, positional='checkpoint') if __name__ == '__main__' else None

import torch  # noqa: E402

from model import (encoding, is_student, load, save, split_rows, write_rows,  # noqa: E402
                   write_whole)
from train_teacher import autocast, generator, load_data, pick_device  # noqa: E402

# ---- Writing rows ----
def known_row(meta, enc, o, source):
    """What is known of a row: given (1, L), ids, -1 at positions to be written."""
    L, (eos, pad, sep, _) = meta['length'], meta['special'].values()
    if (spec := meta['tokenizer'])['name'] == 'dates':          # no bytes to fall back on
        for piece in re.findall(spec['pattern'] + '|.', source, re.S):
            if piece not in spec['tokens']:
                fail(f'{piece!r} is not in the vocabulary of this model')
    ids = encode(enc, source) + [sep] if source else []
    # a hole takes the space before it along, as tokens do: else the space would be one of its own
    for part in re.split('( ?_)', o.infill) if o.infill else [o.prompt]:
        ids += [-1] if part in ('_', ' _') else encode(enc, part)
    if len(ids) > L - 1:
        fail(f'{len(ids)} tokens are given, but a row of this model holds {L}; shorten the text')
    if o.infill and meta['kind'] == 'rows':         # nothing comes behind the last given word
        ids += [eos] + [pad] * (L - len(ids) - 1)
    return torch.tensor([ids + [-1] * (L - len(ids))])

def write(model, given, nfe, seed, **how):
    """The model's rows for given (B, L), to 256 at a time: ((B, L) on the CPU, seconds)."""
    device = next(model.parameters()).device
    rng, rows, start = generator(device, seed, 2), [], time.perf_counter()
    with autocast(device):
        for part in given.split(max(1, min(256, 2 ** 30 // model.config.vocab // given.shape[1]))):
            rows.append(write_rows(model, part.to(device), nfe, rng, **how).cpu())
    return torch.cat(rows), time.perf_counter() - start

def most_alike(pairs):
    """Minimum Bayes risk: the (source, text) whose words and word pairs most others share."""
    bags = [Counter(words) + Counter(zip(words, words[1:]))
            for words in (text.split() for _, text in pairs)]
    alike = [sum((a & b).total() / max(1, (a | b).total()) for b in bags) for a in bags]
    return pairs[alike.index(max(alike))]

# ---- Is it text? ----
def as_rows(ids, L):
    """Flat ids of a .bin file -> its whole rows (n, L)."""
    return torch.from_numpy(ids[:len(ids) // L * L].astype('int64')).view(-1, L)

def to_texts(rows, meta, enc=None):
    """Rows (B, L) -> list of (source, text)."""
    enc = enc or encoding(meta['tokenizer'])
    return [(enc.decode(source), enc.decode(text)) for source, text in split_rows(rows, meta)]

@functools.lru_cache(maxsize=1)
def corpus_words(folder, limit=5_000_000):
    """The set of words in the first `limit` training tokens of data/<name>."""
    meta, train, _ = load_data(folder)
    return set(re.findall('[a-z]+', encoding(meta['tokenizer']).decode(train[:limit]).lower()))

def entropy_of(items):
    """Entropy in nats of how often each item occurs."""
    return sum(c / len(items) * math.log(len(items) / c) for c in Counter(items).values())

def health(rows, meta, data=''):
    """Figures that tell text from noise, for rows (B, L): a dict of floats.
    dates: share of valid rows (one of the eight forms of their source), entropy of these over ln 8.
    Else: entropy of a row's tokens (nats), share of unique rows, of words known from `data`."""
    texts = to_texts(rows, meta)
    if meta['tokenizer']['name'] == 'dates':
        used = [date_forms(source).index(t) for source, t in texts if t in date_forms(source)]
        return {'valid': len(used) / len(texts), 'form_entropy': entropy_of(used) / math.log(8)}
    figures = {'entropy': sum(entropy_of(ids) for _, ids in split_rows(rows, meta)) / len(rows),
               'unique': len(set(texts)) / len(texts)}
    if (Path(data) / 'meta.json').is_file():
        words = re.findall('[a-z]+', ' '.join(text for _, text in texts).lower())
        figures['words'] = sum(w in corpus_words(data) for w in words) / max(1, len(words))
    return figures

def health_line(rows, meta, data, nfe, seconds):
    figures = ', '.join(f'{k} {v:.3f}' for k, v in health(rows, meta, data).items())
    return f'{len(rows)} rows: {figures}; nfe {nfe}, {1000 * seconds / len(rows):.2f} ms per row'

def compare(student, teacher, meta, enc, given, o, data):
    """The same noise through the teacher at 1 and 64 calls and the student, row under row."""
    seen = {}
    for model, nfe in (teacher, 1), (teacher, 64), (student, o.nfe):
        write(model, given[:1], 1, o.seed)      # the first call of all is slow
        calls, who = {}, f'{"student" if model is student else "teacher"} {nfe:2d} |'
        rows, seconds = write(model, given, nfe, o.seed, temperature=o.temperature,
                              watch=lambda i, rows: calls.setdefault(i, rows[:o.n]))
        print(who, health_line(rows, meta, data, nfe, seconds), flush=True)
        seen[who] = [[text for _, text in to_texts(call, meta, enc)] for call in calls.values()]
    for texts in zip(*(calls[-1] for calls in seen.values())):
        print('', *map(' '.join, zip(seen, texts)), sep='\n')
    if o.film:
        film(o.film, *list(seen.values())[1:])

def film(path, many, few):
    """An SVG that plays a teacher's calls, lists of texts, over what a student writes at last."""
    last = len(many) - 1
    svg = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 500 350" font-family="monospace" '
           'font-size="13" fill="#e6edf3">\n<rect width="500" height="350" rx="8" fill="#161b22"/>')
    for i, texts in enumerate(many):
        until = i // last or 0.8 * (i + 1) / last       # share of the time; it rests for a fifth
        svg += (f'\n<text y="10" opacity="{i // last}"><animate attributeName="opacity" dur="10s" '
                'repeatCount="indefinite" calcMode="discrete" values="0;1;0" '
                f'keyTimes="0;{0.8 * i / last:.4f};{until:.4f}"/>')
        for text in (f'teacher: call {i + 1} of {last + 1}', *texts[:6], '',
                     f'student, from the same noise: call {len(few)} of {len(few)}', *few[-1][:6]):
            line = html.escape(''.join(filter(str.isprintable, text))[:60]) or '&#160;'
            svg += f'<tspan x="12" dy="21">{line}</tspan>'
        svg += '</text>'
    write_whole(path, (svg + '\n</svg>\n').encode())

def animate(nfe, meta, enc):
    """A `watch` for sampling: the first rows as they clear up, redrawn in place in a terminal."""
    def watch(i, rows):
        lines = [f'call {i + 1} of {nfe}', *(text for _, text in to_texts(rows[:8], meta, enc))]
        up = f'\033[{len(lines)}A' if i else ''            # back to the first line; then clear each
        print(up + '\n'.join(f'\033[K{line[:100]}' for line in lines), flush=True)
        time.sleep(0.05)
    return watch

SAMPLERS = {'flm': ['euler', 'ab2', 'bridge'], 'diffuseq': ['ancestral', 'ddim']}
def check(o, meta, config):
    for name, low, high in (('nfe', 1, 10 ** 5), ('n', 1, 10 ** 6), ('mbr', 0, 10 ** 4),
                            ('temperature', 0.01, 100), ('gamma', 0, 1)):
        if not low <= getattr(o, name) <= high:
            fail(f'--{name.replace("_", "-")} {getattr(o, name)}: must be from {low} to {high}')
    if o.sampler and o.sampler not in SAMPLERS.get(config.model, [])[:1 if config.two_time else 3]:
        fail(f'--sampler {o.sampler}: flows euler; teachers ab2, bridge; diffuseq ancestral, ddim')
    if (o.temperature != 1 and config.model == 'diffuseq' or o.gamma and config.model != 'flm'
            or (o.sampler or o.gamma or o.mbr or o.watch if o.compare else o.film)):
        fail('--gamma is for flows, --temperature for all but diffusions, --film for --compare, '
             'which takes beside it only --nfe and --temperature')
    asked = [name for name in ('source', 'prompt', 'infill') if getattr(o, name)]
    if len(asked) > 1 or asked and meta['pairs'] != (asked == ['source']):
        fail('models of pairs take --source, the others either --prompt or --infill')

def main(o):
    if o.checkpoint == Options.checkpoint and not Path(o.checkpoint).exists():
        o.checkpoint = Path(__file__).parent / 'assets/pydocs-student.pt'       # trained before
    model, ckpt = load(o.checkpoint, pick_device(o.device))
    meta, data = ckpt['meta'], ckpt.get('teacher', ckpt['options'])['data']
    if o.info:
        del ckpt['meta']['tokenizer']['tokens']
        for name in 'iter', 'config', 'options', 'teacher', 'meta':
            print(f'{name}: {ckpt.get(name)}')
        return print(f'parameters: {sum(p.numel() for p in model.parameters()):,}')
    if o.export:
        model.net.half()        # as weights and as their average the same tensors, stored once
        more = {k: ckpt[k] for k in ('iter', 'meta', 'options', 'teacher') if k in ckpt}
        return save(o.export, model, model, **more)
    check(o, meta, model.config)
    enc, sources = encoding(meta['tokenizer']), [o.source]
    if meta['pairs'] and not o.source:
        if not sys.stdin or sys.stdin.isatty():
            fail('this model needs a source: --source "...", or lines on stdin')
        sources = list(filter(None, map(str.strip, sys.stdin))) or fail('no line on stdin')
    n = max(o.n, 256) if o.compare else o.mbr or o.n        # a health line needs many rows
    given = torch.cat([known_row(meta, enc, o, source).expand(n, -1) for source in sources])
    if o.compare:
        teacher, other = load(o.compare, pick_device(o.device))
        if is_student(teacher.config) or other['meta']['tokenizer'] != meta['tokenizer']:
            fail(f'--compare {o.compare}: needs a teacher with the tokenizer of {o.checkpoint}')
        return compare(model, teacher, meta, enc, given, o, data)
    how = dict(watch=animate(o.nfe, meta, enc)) if o.watch and sys.stdout.isatty() else {}
    how |= {k: x for k in ('sampler', 'gamma', 'temperature') if (x := getattr(o, k))}
    rows, seconds = write(model, given, o.nfe, o.seed, **how)
    texts = to_texts(rows, meta, enc)
    if o.mbr:
        texts = [most_alike(texts[i:i + n]) for i in range(0, len(texts), n)]
    for source, text in texts:
        print(f'{source} -> {text}' if source else text)
    nfe = meta['length'] if model.config.model == 'ar' else o.nfe
    print(health_line(rows, meta, data, nfe, seconds), file=sys.stderr)

if __name__ == '__main__':
    hasattr(signal, 'SIGPIPE') and signal.signal(signal.SIGPIPE, signal.SIG_DFL)    # of `| head`
    main(OPTIONS)
