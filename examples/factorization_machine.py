# SPDX-License-Identifier: Apache-2.0
"""A factorization machine (Rendle 2010) in NumPy, whose gradients are bags of the features of each sample.

    python examples/factorization_machine.py [RATINGS.csv] [--factors N] [--epochs N] [--lr X] [--reg X]

A sample x, sparse, has the prediction ::

    ŷ(x) = w₀ + Σᵢ wᵢ·xᵢ + Σᵢ Σⱼ₍ⱼ>ᵢ₎ ⟨vᵢ, vⱼ⟩·xᵢ·xⱼ

whose last term is ½·Σ_f ((Σᵢ v_if·xᵢ)² − Σᵢ v_if²·xᵢ²), and so costs no more than the features that a sample
has. With g the derivative of the loss by ŷ and s = Σⱼ vⱼ·xⱼ, the gradients are ::

    w₀: g        wᵢ: g·xᵢ        vᵢ: xᵢ·(g·s) − g·xᵢ²·vᵢ

Those of w and the first part of that of v are bags with the weights x, of g and of g·s: a `BagGradient` each.
The second part has a row of its own for each feature of each sample, a `RowGradient`. The step of v takes
both in a list and sums them.

Without a file it makes samples from a factorization machine of its own. With one it predicts ratings: a CSV
of users, items, ratings and times, as MovieLens has them (``ratings.csv``), in the order of the times.
Features are the user, the item, and the items that the user rated just before, whose weights sum to 1. The
last samples are held out.
"""

import argparse
from typing import NamedTuple

import numpy as np
import polars as pl

from nb_sparse_adam import BagGradient, RowGradient, SparseAdam

BEFORE = 3  # items rated just before


class Samples(NamedTuple):
    """Sparse samples, in compressed rows, and what is to be predicted."""

    offsets: np.ndarray  # (samples + 1,)
    ids: np.ndarray  # (n,) features
    x: np.ndarray  # (n,) their values
    y: np.ndarray  # (samples,)

    def take(self, samples):
        """Some of the samples."""
        lengths = np.diff(self.offsets)[samples]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.repeat(self.offsets[samples] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Samples(offsets, self.ids[places], self.x[places], self.y[samples])


class FactorizationMachine:
    """Parameters, and the steps that train them on squared errors."""

    def __init__(self, features, factors, lr, reg, seed=0, dtype=np.float32):
        rng = np.random.default_rng(seed)
        self.bias = np.zeros(1, dtype)
        self.linear = np.zeros(features, dtype)
        self.factors = rng.normal(0, 0.05, (features, factors)).astype(dtype)
        self.reg = reg
        tables = {"bias": self.bias, "linear": self.linear, "factors": self.factors}
        self.optimizer = SparseAdam(tables, lr=lr, step_counts="row")

    def sums(self, batch):
        """Σⱼ vⱼ·xⱼ of each sample (samples, factors), and predictions (samples,)."""
        vectors = self.factors[batch.ids] * batch.x[:, None]
        sums, squares = sum_bags(vectors, batch.offsets), sum_bags(vectors**2, batch.offsets)
        pairs = (sums**2 - squares).sum(1) / 2
        return sums, self.bias[0] + sum_bags(self.linear[batch.ids] * batch.x, batch.offsets) + pairs

    def gradients(self, batch):
        """Gradients of half the mean of squared errors, for `SparseAdam.step`, and the errors (samples,)."""
        sums, predicted = self.sums(batch)
        errors = predicted - batch.y
        g = (errors / len(errors)).astype(self.factors.dtype)
        lengths = np.diff(batch.offsets)
        of_ids = np.repeat(g, lengths) * batch.x**2
        # So much of each feature that it has: λ/2 · (wᵢ² + |vᵢ|²) a sample with it.
        decay = self.factors.dtype.type(self.reg / len(errors))
        gradients = {
            "bias": RowGradient([0], g.sum(keepdims=True)),
            "linear": [
                BagGradient(batch.ids, batch.offsets, g, weights=batch.x),
                RowGradient(batch.ids, decay * self.linear[batch.ids]),
            ],
            "factors": [
                BagGradient(batch.ids, batch.offsets, g[:, None] * sums, weights=batch.x),
                RowGradient(batch.ids, (decay - of_ids)[:, None] * self.factors[batch.ids]),
            ],
        }
        return gradients, errors

    def train(self, samples, batch_size, rng):
        """Go through the samples once, shuffled; return the root of the mean squared error on the way."""
        total, order = 0.0, rng.permutation(len(samples.y))
        for at in range(0, len(order), batch_size):
            gradients, errors = self.gradients(samples.take(order[at : at + batch_size]))
            self.optimizer.step(gradients)
            total += float(errors @ errors)
        return np.sqrt(total / len(order))

    def error_on(self, samples, at_once=65536):
        """Root of the mean squared error on samples that it does not learn from."""
        parts = [np.arange(at, min(at + at_once, len(samples.y))) for at in range(0, len(samples.y), at_once)]
        errors = [self.sums(part)[1] - part.y for part in map(samples.take, parts)]
        return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))


def sum_bags(values, offsets):
    """Sums of the rows of each bag; none of the bags is empty."""
    return np.add.reduceat(values, offsets[:-1], axis=0)


# --- data -------------------------------------------------------------------------------------------------


def generated(samples=20_000, features=300, factors=3, noise=0.1, seed=0):
    """Samples of four features each, of a factorization machine that is known; and how many features."""
    rng = np.random.default_rng(seed)
    truth = FactorizationMachine(features, factors, lr=1, reg=0)
    truth.linear[:] = rng.normal(0, 0.5, features)
    truth.factors[:] = rng.normal(0, 0.7, (features, factors))
    ids = np.argsort(rng.random((samples, features), np.float32), axis=1)[:, :4].ravel()
    x = rng.uniform(0.5, 1.5, len(ids)).astype(np.float32)
    made = Samples(np.arange(0, len(ids) + 1, 4), ids, x, np.zeros(samples, np.float32))
    y = truth.sums(made)[1] + noise * rng.normal(size=samples)
    return made._replace(y=y.astype(np.float32)), features


def read_ratings(path):
    """Samples of a CSV of ratings, ordered by time, and how many features there are."""
    names = ["user", "item", "rating", "time"]
    schema = dict(zip(names, [pl.String, pl.String, pl.Float32, pl.Int64], strict=True))
    frame = pl.read_csv(
        path, columns=range(4), new_columns=names, schema_overrides=list(schema.values()), glob=False
    )
    frame = frame.drop_nulls().sort("time", maintain_order=True)
    frame = frame.with_columns(pl.col("user", "item").rank("dense").cast(pl.Int64) - 1)
    frame = frame.with_columns(
        pl.col("item").shift(n).over("user").alias(f"{n}") for n in range(1, BEFORE + 1)
    )
    users, items = frame["user"].n_unique(), frame["item"].n_unique()
    # Features: users, items, and the items again, as those that were rated before.
    before = frame.select(map(str, range(1, BEFORE + 1))).fill_null(-1).to_numpy()
    given = np.hstack([frame["user"].to_numpy()[:, None], frame["item"].to_numpy()[:, None] + users, before])
    given[:, 2:] += np.where(before >= 0, users + items, 0)
    there = given >= 0
    share = 1 / np.maximum((before >= 0).sum(1), 1)
    x = np.where(np.arange(2 + BEFORE) < 2, 1.0, share[:, None]).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(there.sum(1))])
    return Samples(offsets, given[there], x[there], frame["rating"].to_numpy()), users + 2 * items


# --- command line -----------------------------------------------------------------------------------------


def main(argv=None):
    """Train and print errors; return those of each epoch, (epochs, 2): in training, and held out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ratings", nargs="?", help="a CSV of user, item, rating, time (default: generated)")
    parser.add_argument("--factors", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument(
        "--reg", type=float, default=0.02, help="of weights and factors, a sample that has them"
    )
    parser.add_argument("--hold-out", type=float, default=0.1, help="share of the samples, the last ones")
    args = parser.parse_args(argv)
    if args.ratings:
        try:
            samples, features = read_ratings(args.ratings)
        except (pl.exceptions.PolarsError, OSError) as error:
            parser.error(f"{args.ratings}: expected a header, and users, items, ratings and times, {error}")
    else:
        samples, features = generated()
    number = len(samples.y)
    learnt = number - int(np.ceil(number * args.hold_out))
    if not 0 < learnt < number:
        parser.error(
            f"got {number} samples, and --hold-out {args.hold_out}, expected some to learn and to hold out"
        )
    learning, held_out = samples.take(np.arange(learnt)), samples.take(np.arange(learnt, number))
    model = FactorizationMachine(features, args.factors, args.lr, args.reg)
    mean = learning.y.mean()
    model.bias[0] = mean
    constant = np.sqrt(np.mean((held_out.y - mean) ** 2))
    print(
        f"{learnt:,} samples, {number - learnt:,} held out, {features:,} features; "
        f"the mean's error {constant:.4f}"
    )
    errors, rng = [], np.random.default_rng(1)
    for epoch in range(args.epochs):
        errors.append((model.train(learning, args.batch, rng), model.error_on(held_out)))
        print(f"epoch {epoch + 1}: error {errors[-1][0]:.4f} in training, {errors[-1][1]:.4f} held out")
    return np.array(errors)


if __name__ == "__main__":
    main()
