# SPDX-License-Identifier: Apache-2.0
"""The same recommender in torch follows the same loss curve."""

import numpy as np
import pytest
from interaction_files import weighted
from needs import need

from nb_sparse_adam._src.recommender.interactions import generate, hold_out
from nb_sparse_adam.recommender import BPRModel, BPROptions, epoch_batches

torch = need("torch")

EPOCHS = 3


def torch_losses(split, options, user_table, item_table):
    """Mean loss of each epoch, of an ordinary torch training loop over the same batches."""
    user = torch.nn.Embedding.from_pretrained(torch.tensor(user_table), freeze=False, sparse=True)
    item = torch.nn.Embedding.from_pretrained(torch.tensor(item_table), freeze=False, sparse=True)
    optimizer = torch.optim.SparseAdam(
        [user.weight, item.weight], lr=options.lr, betas=options.betas, eps=options.eps
    )
    epochs = []
    for epoch in range(1, EPOCHS + 1):
        losses, triples = [], []
        for batch in epoch_batches(split, options, epoch):
            users = torch.tensor(np.repeat(batch.users, options.negatives), dtype=torch.int64)
            positives = torch.tensor(np.repeat(batch.positives, options.negatives), dtype=torch.int64)
            negatives = torch.tensor(batch.negatives.ravel(), dtype=torch.int64)
            u, i, j = user(users), item(positives), item(negatives)
            scores = (u * i).sum(1) - (u * j).sum(1)
            weights = torch.tensor(np.repeat(batch.weights, options.negatives))
            loss = (weights * torch.nn.functional.softplus(-scores)).mean()
            loss = loss + options.reg / 2 * (u**2 + i**2 + j**2).sum() / len(users)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            triples.append(len(users))
        epochs.append(np.average(losses, weights=triples))
    return epochs, user.weight.detach().numpy(), item.weight.detach().numpy()


@pytest.mark.jit
@pytest.mark.parametrize("negatives", [1, 3])
@pytest.mark.parametrize(
    "weighting", [lambda split: split, weighted], ids=["without weights", "with weights"]
)
def test_the_loss_curve_is_torchs(negatives, weighting):
    split = weighting(hold_out(generate(400, 200, 15.0)))
    options = BPROptions(
        dim=16, epochs=EPOCHS, batch_size=256, lr=0.05, reg=0.02, negatives=negatives,
        step_counts="global", eps_hat=True, eval_every=0, loss="bpr", init_std=0.1,
    )  # fmt: skip
    model = BPRModel(split, options)
    theirs, user_table, item_table = torch_losses(split, options, model.user_table, model.item_table)
    model.fit()
    ours = [record.loss for record in model.history]
    assert ours[-1] < ours[0] - 0.1  # there is a curve to follow
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
    # The vectors too, but for what rounding has grown to after 60 steps.
    np.testing.assert_allclose(model.user_table, user_table, rtol=0, atol=1e-3)
    np.testing.assert_allclose(model.item_table, item_table, rtol=0, atol=1e-3)
