# SPDX-License-Identifier: Apache-2.0
"""Word vectors by skip-gram with negative sampling, in a loop of your own (word2vec, Mikolov et al. 2013).

    python examples/skip_gram.py [TEXT] [--dim N] [--epochs N] [--lr X]

Without a file it writes a text of its own, whose words belong to topics. Each thread takes sentences of its
own and updates the vectors that they share without locks, as Hogwild (Niu et al. 2011) does: two threads that
meet at one word may lose an update, and results differ a little from run to run; ``--threads 1`` is exact.
"""

import argparse
import math
import re
from pathlib import Path

import numba
import numpy as np
from numba import njit, prange

from nb_sparse_adam import SparseAdam, apply_row_gradient

WINDOW, NEGATIVES = 4, 5


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


def read(path):
    """Sentences of a text file; words that occur less than five times are left out."""
    sentences = [re.findall(r"\w+", line.lower()) for line in Path(path).read_text("utf-8").splitlines()]
    found, counts = np.unique([w for sentence in sentences for w in sentence], return_counts=True)
    names = [str(w) for w in found[counts >= 5]]
    number = {w: i for i, w in enumerate(names)}
    kept = [[number[w] for w in sentence if w in number] for sentence in sentences]
    return np.array([w for s in kept for w in s]), np.cumsum([len(s) for s in kept]), names


def nearest(vectors, count):
    """The words with the largest cosine to each word, itself left out."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    return np.argsort(-cosine, axis=1)[:, :count]


def main(argv=None):
    """Train, print the loss of each epoch and some neighbours; return names, vectors and losses."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", nargs="?", help="a text file, a sentence a line (default: generated)")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--threads", type=int, default=numba.get_num_threads())
    args = parser.parse_args(argv)

    rng = np.random.default_rng(0)
    text, ends, names = read(args.text) if args.text else generated(rng)
    if len(text) == 0:
        parser.error(f"{args.text} holds no word five times or more, expected more text")
    frequency = np.bincount(text, minlength=len(names)) ** 0.75  # of negative samples, as in the paper
    noise = rng.choice(len(names), size=100_000, p=frequency / frequency.sum())
    words = rng.uniform(-0.5, 0.5, (len(names), args.dim)).astype(np.float32) / args.dim
    contexts = np.zeros((len(names), args.dim), np.float32)
    optimizer = SparseAdam({"words": words, "contexts": contexts}, lr=args.lr, on_nonfinite="skip")

    history = []
    for epoch in range(args.epochs):
        losses, pairs = np.zeros(args.threads), np.zeros(args.threads, np.int64)
        scratch = np.empty((2 * args.threads, args.dim), np.float32)
        with optimizer.kernel_table("words") as w, optimizer.kernel_table("contexts") as c:
            train_epoch(w, c, text, ends, noise, scratch, losses, pairs, epoch * len(ends))
        history.append(losses.sum() / pairs.sum())
        print(f"epoch {epoch + 1}: loss {history[-1]:.4f} a pair, {pairs.sum():,} pairs")
    for word, near in list(enumerate(nearest(words, 4)))[: min(len(names), 60) : 20]:
        print(f"{names[word]}: {', '.join(names[n] for n in near)}")
    return names, words, history


if __name__ == "__main__":
    main()
