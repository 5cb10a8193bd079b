# SPDX-License-Identifier: Apache-2.0
"""Word vectors by skip-gram with negative sampling, in a loop of your own (word2vec, Mikolov et al. 2013).

    python examples/skip_gram.py [TEXT] [--dim N] [--epochs N] [--lr X] [--save FILE] [--similar WORD]
    python examples/skip_gram.py --load FILE --similar WORD

Without a file it writes a text of its own, whose words belong to topics. A text is read in pieces, so that it
may be one line, as text8 is. Each thread takes sentences of its own and updates the vectors that they share
without locks, as Hogwild (Niu et al. 2011) does: two threads that meet at one word may lose an update, and
results differ a little from run to run; ``--threads 1`` is exact.

``--save`` writes a file of safetensors, ``vectors`` (words, dim) and, in its metadata, the words as JSON.
"""

import argparse
import difflib
import json
import math
import re
from array import array
from pathlib import Path

import numba
import numpy as np
from numba import njit, prange
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nb_sparse_adam import SparseAdam, apply_row_gradient

WINDOW, NEGATIVES = 4, 5
PIECE = 1 << 20  # characters that are read at once
LONGEST = 1000  # words of a sentence, as in word2vec; a longer line is several of them, which threads share
RAREST = 5  # occurrences of a word that is kept


@njit
def train_sentence(words, contexts, sentence, noise, pull, push, rng_seed):
    """One pass over a sentence; returns the sum of the losses, and how many pairs there were."""
    np.random.seed(rng_seed)  # noqa: NPY002 (numba's own generator, one a thread)
    loss, pairs = 0.0, 0
    for at in range(len(sentence)):
        word = sentence[at]
        for near in range(max(at - WINDOW, 0), min(at + WINDOW + 1, len(sentence))):
            if near == at:
                continue
            push[:] = 0
            for sample in range(NEGATIVES + 1):  # the first is the word that was there
                drawn = np.random.randint(len(noise))  # noqa: NPY002
                other = sentence[near] if sample == 0 else noise[drawn]
                if sample and other == sentence[near]:
                    continue
                score = 0.0
                for j in range(len(push)):
                    score += words.param[word, j] * contexts.param[other, j]
                label = 1.0 if sample == 0 else 0.0
                error = np.float32(1 / (1 + math.exp(-score)) - label)
                loss += math.log1p(math.exp(-score if sample == 0 else score))
                for j in range(len(push)):
                    push[j] += error * contexts.param[other, j]
                    pull[j] = error * words.param[word, j]
                apply_row_gradient(contexts, other, pull)
            apply_row_gradient(words, word, push)
            pairs += 1
    return loss, pairs


@njit(parallel=True)
def train_epoch(words, contexts, text, ends, noise, scratch, losses, pairs, seed):
    """Share the sentences out to threads, which have two rows of ``scratch`` each."""
    chunks = len(losses)
    for t in prange(chunks):
        for s in range(len(ends) * t // chunks, len(ends) * (t + 1) // chunks):
            start = ends[s - 1] if s else 0
            loss, n = train_sentence(
                words, contexts, text[start : ends[s]], noise, scratch[2 * t], scratch[2 * t + 1], seed + s
            )
            losses[t] += loss
            pairs[t] += n


def generated(rng, topics=20, words_each=25, sentences=4000, length=12):
    """Sentences whose words are all of one topic; word w is of topic ``w // words_each``."""
    topic = rng.integers(topics, size=(sentences, 1))
    text = (topic * words_each + rng.integers(words_each, size=(sentences, length))).ravel()
    names = [f"topic{w // words_each}-word{w % words_each}" for w in range(topics * words_each)]
    return text, np.arange(1, sentences + 1) * length, names


def lines_of(path):
    """Lists of words, of a line each or of a piece of it, and whether the line ends there."""
    with Path(path).open(encoding="utf-8") as file:
        held = ""  # a word that may go on in the next piece
        while piece := file.readline(PIECE):
            words, ends = re.findall(r"\w+", held + piece), piece.endswith("\n")
            held = words.pop() if not ends and re.fullmatch(r"\w", piece[-1]) else ""
            yield words, ends
        yield [held] if held else [], True


def read(path):
    """Sentences of a text file: ids, where sentences end, and words. Rare words are left out."""
    number, ids, ends = {}, array("i"), []
    for words, is_end in lines_of(path):
        ids.extend([number.setdefault(word.lower(), len(number)) for word in words])
        if is_end:
            ends.append(len(ids))
    ids, ends = np.frombuffer(ids, np.intc), np.array(ends)
    names = np.array(list(number), object)
    kept = np.flatnonzero(np.bincount(ids, minlength=len(names)) >= RAREST)
    kept = kept[np.argsort(names[kept])]
    new_id = np.full(len(names), -1, np.intc)
    new_id[kept] = np.arange(len(kept))
    ids = new_id[ids]
    ends = np.concatenate([[0], np.cumsum(ids >= 0)])[ends]
    return ids[ids >= 0], cut(ends), names[kept].tolist()


def cut(ends):
    """Cut sentences that are longer than `LONGEST`; where the new ones end."""
    starts = np.concatenate([[0], ends[:-1]])
    pieces = [
        np.arange(s + LONGEST, e, LONGEST) for s, e in zip(starts, ends, strict=True) if e - s > LONGEST
    ]
    return np.unique(np.concatenate([*pieces, ends[ends > starts]]))


def nearest(vectors, of, count):
    """The words with the largest cosine to each of some, itself left out: (len(of), count)."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    near = np.empty((len(of), min(count, len(vectors) - 1)), np.int64)
    for i, word in enumerate(of):  # one after the other: memory for one word's cosines, whatever is asked
        cosine = unit @ unit[word]
        cosine[word] = -np.inf
        best = np.argpartition(-cosine, near.shape[1] - 1)[: near.shape[1]] if near.shape[1] else near[i]
        near[i] = best[np.argsort(-cosine[best], kind="stable")]
    return near


def save(path, names, vectors):
    """Write words and their vectors to one file."""
    save_file({"vectors": vectors}, path, metadata={"words": json.dumps(names)})


def load(path):
    """Read what `save` wrote: words and vectors."""
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["words"]), file.get_tensor("vectors")


def train(text, ends, names, args):
    """Train and print the loss of each epoch; return the vectors of words, and the losses."""
    rng = np.random.default_rng(0)
    frequency = np.bincount(text, minlength=len(names)) ** 0.75  # of negative samples, as in the paper
    noise = rng.choice(len(names), size=max(100_000, 10 * len(names)), p=frequency / frequency.sum())
    words = rng.uniform(-0.5, 0.5, (len(names), args.dim)).astype(np.float32) / args.dim
    contexts = np.zeros((len(names), args.dim), np.float32)
    optimizer = SparseAdam({"words": words, "contexts": contexts}, lr=args.lr, on_nonfinite="skip")

    history = []
    for epoch in range(args.epochs):
        losses, pairs = np.zeros(args.threads), np.zeros(args.threads, np.int64)
        scratch = np.empty((2 * args.threads, args.dim), np.float32)
        with optimizer.kernel_table("words") as w, optimizer.kernel_table("contexts") as c:
            train_epoch(w, c, text, ends, noise, scratch, losses, pairs, epoch * len(ends))
        history.append(losses.sum() / max(pairs.sum(), 1))
        print(f"epoch {epoch + 1}: loss {history[-1]:.4f} a pair, {pairs.sum():,} pairs")
    return words, history


def arguments(argv):
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "text", nargs="?", help="a text file, a sentence a line or all in one (default: generated)"
    )
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--threads", type=int, default=numba.get_num_threads())
    parser.add_argument("--save", metavar="FILE", help="write the vectors to a safetensors file")
    parser.add_argument("--load", metavar="FILE", help="train nothing: use the vectors that --save wrote")
    parser.add_argument(
        "--similar", metavar="WORD", action="append", help="print its neighbours; may be repeated"
    )
    parser.add_argument("--top", type=int, default=4, help="how many neighbours")
    args = parser.parse_args(argv)
    if args.load and (args.text or args.save):
        parser.error("--load trains nothing, expected neither a text nor --save beside it")
    if args.load and not args.similar:
        parser.error("--load without --similar has nothing to do, expected a word")
    if args.save and not Path(args.save).absolute().parent.is_dir():  # before training, not after it
        parser.error(f"--save: there is no folder {Path(args.save).parent}")
    if args.top < 1:
        parser.error(f"--top is {args.top}, expected at least 1")
    return parser, args


def main(argv=None):
    """Train or load, print neighbours; return names, vectors and losses."""
    parser, args = arguments(argv)
    history = []
    if args.load:
        try:
            names, words = load(args.load)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            parser.error(f"--load: {args.load}: expected a file that --save wrote, {error!r}")
    else:
        try:
            text, ends, names = read(args.text) if args.text else generated(np.random.default_rng(0))
        except (OSError, UnicodeError) as error:
            parser.error(f"{args.text}: expected a text in UTF-8, {error}")
        if len(text) == 0:
            parser.error(f"{args.text} holds no word five times or more, expected more text")
    number = {name: i for i, name in enumerate(names)}
    for word in args.similar or ():  # before training, not after it
        if word not in number:
            close = difflib.get_close_matches(word, names)
            parser.error(
                f"--similar: there is no word {word!r}" + (f", but {', '.join(close)}" if close else "")
            )
    if not args.load:
        words, history = train(text, ends, names, args)
    if args.save:
        save(args.save, names, words)
        print(f"{len(names):,} vectors: {args.save}")
    asked = [number[word] for word in args.similar] if args.similar else range(0, min(len(names), 60), 20)
    for word, near in zip(asked, nearest(words, asked, args.top), strict=True):
        print(f"{names[word]}: {', '.join(names[n] for n in near)}")
    return names, words, history


if __name__ == "__main__":
    main()
