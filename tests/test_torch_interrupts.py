# SPDX-License-Identifier: Apache-2.0
"""The drop-in optimizer, interrupted between any two bytecodes of its own: nothing stays half set.

A signal handler that raises does so in between bytecodes of whatever is running. Here an exception is raised
once in one of these places of the modules of `nb_sparse_adam.torch`, one run after the other: in every 23rd
of them, or, with ``--long``, in each.
"""

import copy
import functools
import pickle
import sys
import threading

import numpy as np
import pytest
from interrupts import interrupted
from needs import need

torch = need("torch")

import nb_sparse_adam.torch  # noqa: E402
from nb_sparse_adam.torch import SparseAdam  # noqa: E402

pytestmark = [
    pytest.mark.jit,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # generators let go
]

OURS = nb_sparse_adam._src.torch.__file__.removesuffix("__init__.py")


@pytest.fixture
def everywhere(request):
    return functools.partial(_everywhere, 1 if request.config.option.long else 23)


def _everywhere(apart, scenario):
    """Interrupt each run of a scenario in another place: it gives a call and a check."""
    at = 1
    while True:
        at += apart
        call, check = scenario()
        place = interrupted(call, at, every=True, files=OURS)
        if place is None:
            break
        try:
            check()
        except BaseException as error:
            raise AssertionError(f"after an interrupt at {place} (the {at}th)") from error
    assert at > 50


def in_another_thread(call):
    """A thread that would wait for ever is no more than a failure."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "somebody still has the turn"


def gradient(seed):
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.normal(size=(4, 3)))
    return torch.sparse_coo_tensor(
        torch.from_numpy(rng.integers(0, 6, (1, 4))), values, (6, 3), check_invariants=True
    )


def made(steps=0, transposed=False, **options):
    """Two parameters with an optimizer, after some steps; one may have memory of other strides."""
    shape = torch.zeros(3, 6, dtype=torch.float64).T if transposed else torch.zeros(6, 3, dtype=torch.float64)
    params = [torch.nn.Parameter(shape), torch.nn.Parameter(torch.ones(6, 3, dtype=torch.float64))]
    optimizer = SparseAdam(params, lr=0.1, **options)
    for number in range(steps):
        stepped(params, optimizer, number)
    return params, optimizer


def stepped(params, optimizer, number):
    for at, param in enumerate(params):
        param.grad = gradient(10 * number + at)
    optimizer.step()


def bits(params, optimizer):
    found = [param.detach().contiguous().numpy().tobytes() for param in params]
    for param in params:
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = optimizer.state[param].get(key)
            found.append(value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else value)
    return found


@pytest.mark.parametrize(
    ("step_counts", "steps", "transposed"), [("global", 0, True), ("global", 1, False), ("row", 1, True)]
)
def test_a_step(everywhere, step_counts, steps, transposed):
    expected = [bits(*made(number, transposed, step_counts=step_counts)) for number in range(steps + 3)]

    def scenario():
        params, optimizer = made(steps, transposed, step_counts=step_counts)

        def check():
            found = bits(params, optimizer)
            assert found in expected[steps : steps + 2]  # what is shown is what has been done
            number = expected.index(found)
            in_another_thread(lambda: [stepped(params, optimizer, k) for k in range(number, steps + 2)])
            assert bits(params, optimizer) == expected[steps + 2]

        return lambda: stepped(params, optimizer, steps), check

    everywhere(scenario)


def test_options_that_change(everywhere):
    def scenario():
        params, optimizer = made(1)
        others, other = made(1)

        def call():
            optimizer.param_groups[0].update(lr=0.5, betas=(0.5, 0.6), maximize=True)
            stepped(params, optimizer, 1)

        def check():
            done = optimizer.state[params[0]]["step"] == 2
            if done:
                other.param_groups[0].update(lr=0.5, betas=(0.5, 0.6), maximize=True)
                stepped(others, other, 1)
            for each, its in ((optimizer, params), (other, others)):
                each.param_groups[0].update(lr=0.1, betas=(0.9, 0.999), maximize=False)
                in_another_thread(lambda each=each, its=its: stepped(its, each, 2))
            assert bits(params, optimizer) == bits(others, other)

        return call, check

    everywhere(scenario)


def test_a_state_that_is_loaded(everywhere):
    (before_params, before), (after_params, after) = made(1), made(3)
    state = after.state_dict()
    expected = []
    for optimizer, params in ((before, before_params), (after, after_params)):
        with torch.no_grad():
            for param in params:
                param.fill_(1.0)
        stepped(params, optimizer, 5)
        expected.append(bits(params, optimizer))

    def scenario():
        params, optimizer = made(1)
        with torch.no_grad():
            for param in params:
                param.fill_(1.0)

        def check():
            in_another_thread(lambda: stepped(params, optimizer, 5))
            assert bits(params, optimizer) in expected  # all of it, or nothing

        return lambda: optimizer.load_state_dict(state), check

    everywhere(scenario)


@pytest.mark.parametrize("copying", [copy.deepcopy, pickle.dumps, SparseAdam.state_dict])
def test_what_changes_nothing(everywhere, copying):
    expected = [bits(*made(number)) for number in (1, 2)]

    def scenario():
        params, optimizer = made(1)
        for param in params:
            param.grad = None

        def check():
            assert bits(params, optimizer) == expected[0]
            in_another_thread(lambda: stepped(params, optimizer, 1))
            assert bits(params, optimizer) == expected[1]

        return lambda: copying(optimizer), check

    everywhere(scenario)


def test_a_group_that_is_added(everywhere):
    def scenario():
        params, optimizer = made(1)
        third = torch.nn.Parameter(torch.ones(6, 3, dtype=torch.float64))

        def check():
            if len(optimizer.param_groups) == 1:
                optimizer.add_param_group({"params": [third], "lr": 0.3})
            third.grad = gradient(0)
            in_another_thread(lambda: stepped(params, optimizer, 1))
            assert [optimizer.state[p]["step"] for p in [*params, third]] == [2, 2, 1]

        return lambda: optimizer.add_param_group({"params": [third], "lr": 0.3}), check

    everywhere(scenario)


def test_a_parameter_that_is_rearranged(everywhere):
    source = torch.tensor([4, -1, 1])

    def exchanged(params, optimizer):
        new = torch.nn.Parameter(params[0].detach()[:3])
        optimizer.rearrange(params[0], new, source)
        return [new, params[1]]

    params, optimizer = made(2, step_counts="row")
    expected = bits(exchanged(params, optimizer), optimizer)

    def scenario():
        params, optimizer = made(2, step_counts="row")
        new = torch.nn.Parameter(params[0].detach()[:3])
        before = bits(params, optimizer)

        def check():
            its = optimizer.param_groups[0]["params"]
            assert set(optimizer.state) == set(its)
            assert bits(its, optimizer) == (before if its[0] is params[0] else expected)
            if its[0] is params[0]:
                in_another_thread(lambda: optimizer.rearrange(params[0], new, source))
            assert bits(its, optimizer) == expected

        return lambda: optimizer.rearrange(params[0], new, source), check

    everywhere(scenario)


def test_a_handler_may_step_within_a_step(request):
    """Two steps of one gradient, the second one wherever it comes in the first, are two steps."""
    params, optimizer = made(0)
    for _ in range(2):
        stepped(params, optimizer, 0)
    expected = bits(params, optimizer)
    at, ended = 0, False
    while not ended:
        at += 3 if request.config.option.long else 47
        params, optimizer = made(0)
        for number, param in enumerate(params):
            param.grad = gradient(number)
        seen = 0

        def trace(frame, event, _, at=at, optimizer=optimizer):
            nonlocal seen
            if not frame.f_code.co_filename.startswith(OURS):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                seen += 1
                if seen == at:
                    optimizer.step()
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            optimizer.step()
        finally:
            sys.settrace(before)
        ended = seen < at
        if not ended:
            assert bits(params, optimizer) == expected, at
