# SPDX-License-Identifier: Apache-2.0
"""`SparseAdam`: what ``torch.optim.SparseAdam`` takes and does, done by the engine."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nb_sparse_adam._src import options
from nb_sparse_adam._src.annotations import DeviceChecks, OnNonfinite, StepCounts
from nb_sparse_adam._src.engine import locks
from nb_sparse_adam._src.public import public
from nb_sparse_adam._src.torch import deferred, groups
from nb_sparse_adam._src.torch.param_state import ParamState, has_state
from nb_sparse_adam._src.torch.plain import copy_state, plain_copy, set_values
from nb_sparse_adam._src.torch.rearranging import check_replacement, rearranged, source_of
from nb_sparse_adam._src.torch.steps import Job, step_jobs
from nb_sparse_adam._src.torch.tensors import Gpu, coo, is_in_shared_memory
from nb_sparse_adam.errors import OptionError


@public("nb_sparse_adam.torch")
class SparseAdam(torch.optim.Optimizer):
    r"""``torch.optim.SparseAdam``, many times faster: the same numbers, arguments, state dict and errors.

    Parameters
    ----------
    params : iterable of Tensor, of (str, Tensor), or of dict
        Parameters, float32 or float64, on the CPU or on an NVIDIA GPU (extra ``cuda``), or groups of them
        with options of their own. They are updated in place; contiguous ones without a copy. A step may be of
        parameters on the CPU and on one GPU.
    lr : float or Tensor of one element, default 1e-3
        Learning rate, > 0 (0 is allowed in groups, and later, for schedulers).
    betas : (float, float), default (0.9, 0.999)
        Decay rates of the running means of the gradient and of its square, 0 ≤ β < 1.
    eps : float, default 1e-8
        Added to the denominator, > 0.
    maximize : bool, default False
        Ascend instead of descend.
    step_counts : {"global", "row", "element"}, default "global"
        What the bias correction counts. "global": the steps of the parameter, as torch does. "row" and
        "element" correct each row or element by the steps that it took part in, and "element" leaves out
        those whose gradient is zero. Fixed for the life of the optimizer.
    eps_hat : bool, default True
        Add ε before the correction of v, as torch does. False: after it, as in Algorithm 1 of the paper [1]_.
    on_nonfinite : {"propagate", "raise", "skip"}, default "propagate"
        What to do with gradients that are NaN or infinite. "propagate" lets them through, as torch does.
        Recommended: "raise", which refuses the step before anything is written. "skip" leaves out the rows
        that receive one, and counts them in `skipped_rows`.
    device_checks : {"immediate", "deferred", "off"}, default "immediate"
        For parameters on a GPU, as in `nb_sparse_adam.SparseAdam`. "immediate": the host waits for the checks
        of each step, and errors are raised at once. "deferred": it waits for nothing; a step that is refused,
        and all after it, change nothing, until a later `step`, `synchronize` or `state_dict` raises the
        error. "off": ids are not checked, at the caller's risk. No part of a state dict.

    Raises
    ------
    OptionError
        For an option outside its domain (also a ValueError).
    TableError
        For a parameter of another dtype or on a device of another kind (also a ValueError).

    Notes
    -----
    Gradients are sparse COO tensors, coalesced or not, as ``sparse=True`` makes torch's embeddings give them.
    Entries that occur more than once are summed, in an order that the gradient alone fixes. With several
    sparse dimensions the entries that are stored are updated, and no others; ``step_counts="row"`` refuses
    them.

    A step is all or nothing: if one parameter's gradient is refused, no parameter has been changed. It uses
    at most as many threads as ``torch.get_num_threads()`` and ``numba.get_num_threads()`` say. Python threads
    that step one optimizer take turns.

    ``state[p]`` has torch's "step", "exp_avg" and "exp_avg_sq", the moments being strided tensors that show
    the live state; "step" is a tensor of counts unless ``step_counts="global"``. `state_dict` copies them.
    It is one dict, updated in place. Your own keys in it are kept. What you assign is copied and gone on with
    (a "step" of 0 begins bias correction anew, of all rows too), and so is what you change in place. Counts
    are checked where torch knows of the change: not through ``.data`` or ``.numpy()``.
    The tensors are where the parameter is. With ``device_checks="deferred"`` the number "step" counts a step
    that was refused, and those after it, until the error is raised; then it is what the GPU has.

    On a GPU a step is launched on torch's current stream. Whatever `device_checks` says, the host waits for
    it where a parameter is not contiguous.

    References
    ----------
    .. [1] Kingma, D. P., and Ba, J., "Adam: A Method for Stochastic Optimization", ICLR 2015.

    Examples
    --------
    >>> embedding = torch.nn.Embedding(1000, 8, sparse=True)
    >>> optimizer = SparseAdam(embedding.parameters(), lr=0.01)
    >>> embedding(torch.tensor([3, 17, 3])).sum().backward()
    >>> optimizer.step()
    """

    _device_checks: DeviceChecks = "immediate"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        *,
        step_counts: StepCounts = "global",
        eps_hat: bool = True,
        on_nonfinite: OnNonfinite = "propagate",
        device_checks: DeviceChecks = "immediate",
    ) -> None:
        groups.check_defaults(lr, betas, eps)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "maximize": maximize,
            "step_counts": step_counts,
            "eps_hat": eps_hat,
            "on_nonfinite": on_nonfinite,
        }
        self.turn = locks.new_lock(self, "turn", outer=True)
        self._param_states: dict[Tensor, ParamState] = {}
        super().__init__(params, defaults)
        self._register_hooks()
        self.device_checks = device_checks

    def _register_hooks(self) -> None:
        self.register_state_dict_pre_hook(SparseAdam.synchronize)  # type: ignore[arg-type]
        self.register_state_dict_post_hook(copy_state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own where it has them.

        Parameters
        ----------
        param_group : dict
            "params", and any of the options.
        """
        with self.turn:
            before = len(self.param_groups)
            try:
                super().add_param_group(param_group)
                groups.check_group(self.param_groups[before], before)
            except BaseException:
                del self.param_groups[before:]
                raise

    @property
    def device_checks(self) -> DeviceChecks:
        """When gradients on a GPU are checked, and who waits; settable between steps."""
        return self._device_checks

    @device_checks.setter
    def device_checks(self, value: DeviceChecks) -> None:
        value = options.choice("device_checks", value, options.DEVICE_CHECKS)
        with self.turn:
            self.check_device_checks(value)
            self.set_device_checks(value)

    def set_device_checks(self, value: DeviceChecks) -> None:
        """Set `device_checks` for parameters that may yet be moved to a GPU."""
        value = options.choice("device_checks", value, options.DEVICE_CHECKS)
        with self.turn:
            self.synchronize()  # without "deferred", nothing would ask for an earlier error
            self._device_checks = value

    def check_device_checks(self, value: DeviceChecks) -> None:
        """Refuse `device_checks` that mean nothing where the parameters are."""
        params = (param for group in self.param_groups for param in group["params"])
        if value != "immediate" and not any(map(Gpu.has, params)):
            raise options.needless_checks(value, "parameter", "CPU")

    @property
    def skipped_rows(self) -> Mapping[Tensor, int]:
        """For each parameter that has been stepped, how often ``on_nonfinite="skip"`` left out a row.

        It waits for the GPU where one is there.
        """
        with self.turn:
            states = self._param_states.items()
            return {param: int(each.table.skipped_rows) for param, each in states if each.is_shown}

    @property
    def param_states(self) -> list[ParamState]:
        """What the engine holds for the parameters that have been stepped or loaded; for fused layers."""
        return list(self._param_states.values())

    # --- steps --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss anew, with gradients, and returns it.

        Returns
        -------
        The closure's loss, or None.

        Raises
        ------
        DenseGradientError
            For a gradient that is not sparse (also a RuntimeError). No parameter has been changed then.
        GradientError
            For one that is malformed, or, with ``on_nonfinite="raise"``, not finite; the same holds. With
            ``device_checks="deferred"`` it may be that of an earlier step, and this one has not been taken.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self.turn:
            deferred.raise_what_is_known(self.param_states)
            step_jobs(
                [
                    self._job(param, group, groups.name_of(group, g, i))
                    for g, group in enumerate(self.param_groups)
                    for i, param in enumerate(group["params"])
                    if param.grad is not None
                ]
            )
        return loss

    def synchronize(self) -> None:
        """Wait until all steps on a GPU are done; on the CPU there is nothing to wait for.

        Raises
        ------
        GradientError
            With ``device_checks="deferred"``, if a step was refused. That step, and all that were called
            after it, have changed nothing; the next one is a new beginning.
        """
        with self.turn:
            deferred.settle(self.param_states)

    def _job(self, param: Tensor, group: dict[str, Any], name: str) -> Job:
        assert param.grad is not None
        grad = coo(name, param.grad, param.device)
        param_state = self.ready(param, group, name, grad.sparse_dim())
        return Job(self, param, param_state, param_state.gradient(param, grad), grad)

    def ready(self, param: Tensor, group: dict[str, Any], name: str, sparse_dim: int) -> ParamState:
        """What the engine holds for a parameter, up to date with its memory, state and options."""
        param_state = self._state_of(param, sparse_dim, group["step_counts"], name)
        given = (self._device_checks, *groups.used_options(group))
        if given != param_state.given:  # checked once, not in every step
            options_now = groups.options_of(group)
            param_state.given = None  # until all of them are in use
            param_state.use(options_now, self._device_checks)
            param_state.given = given
        param_state.use_threads()
        return param_state

    def has_stepped(self, param: Tensor, param_state: ParamState) -> None:
        """Show a parameter's new state."""
        self._param_states[param] = param_state
        entry = self.state.get(param)
        if not isinstance(entry, dict):
            entry = self.state[param] = {} if entry is None else dict(entry)
        param_state.show(entry)

    def _state_of(self, param: Tensor, sparse_dim: int, step_counts: StepCounts, name: str) -> ParamState:
        """What the engine holds for a parameter, made anew where something has been exchanged since."""
        param_state, entry = self._param_states.get(param), self.state.get(param)
        if param_state is not None:
            if param_state.step_counts != step_counts:
                raise OptionError(
                    f"step_counts of parameter {name} is {step_counts!r} now, expected "
                    f"{param_state.step_counts!r}: it is fixed when the first step is taken"
                )
            if param_state.is_current(param, sparse_dim, entry):
                return param_state
            deferred.settle([param_state])
        present = {p for group in self.param_groups for p in group["params"]}
        for gone in [p for p in list(self._param_states) if p not in present]:
            self._param_states.pop(gone, None)
        renewed = ParamState(name, param, sparse_dim, step_counts, after=param_state)
        if has_state(entry):
            renewed.check_load(entry)()
        if param_state is not None and self._param_states.get(param) is param_state:
            self._param_states.pop(param, None)
        # Before this step ends: a signal handler may take a step in its middle, and both must use one state.
        return self._param_states.setdefault(param, renewed)

    # --- state --------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copy state and options: what a step changes later, or a scheduler, is not changed in it.

        Returns
        -------
        dict
            As torch's: "state", by the parameters' numbers, and "param_groups". Tensors are contiguous, and
            NumPy's numbers are Python's, so that ``torch.load(..., weights_only=True)`` reads it.
        """
        with self.turn:
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, also that of ``torch.optim.SparseAdam``.

        Parameters
        ----------
        state_dict : dict
            Of an optimizer with as many parameters, of the same shapes, in each group.

        Raises
        ------
        StateError
            If it does not fit; nothing has been changed then.
        """
        with self.turn:
            super().load_state_dict(state_dict)

    @torch.no_grad()
    def rearrange(self, old_param: Tensor, new_param: Tensor, source: Any) -> None:
        """Put another parameter in the place of one; its rows take the moments and counts of old rows.

        For rows that come, go or change places: Gaussians that are split and pruned, a vocabulary that grows,
        users that are dropped. To append, prune, reorder and reset rows are all this one thing.

        Parameters
        ----------
        old_param : Tensor
            A parameter of this optimizer.
        new_param : Tensor
            Takes its place in its group; its values are yours, and are not touched. It has the dtype of the
            old one, and its shape but for the first dimension. It may be the same Parameter, with other
            memory or not, but no other one of this optimizer.
        source : (rows,) integer Tensor or array
            For each row of `new_param` (place in its first dimension) the row of the old one whose moments
            and counts it takes, -1 for a fresh row: moments and counts are 0. A row that is named more than
            once is copied for each.

        Raises
        ------
        TableError
            If `old_param` is none of this optimizer's, or `new_param` cannot take its place.
        StateError
            If `source` is malformed, or names a row that is not there; if what is in ``state[old_param]``
            cannot be gone on with.
        GradientError
            With ``device_checks="deferred"``, for an earlier step.

        Notes
        -----
        If it raises, nothing has been changed. The number "step" of ``step_counts="global"`` and
        `skipped_rows` are of the whole parameter, and stay. A parameter that has not been stepped has nothing
        to rearrange: the new one just takes its place. The dict ``state[old_param]`` becomes that of
        `new_param`, with the keys that you put there as they are; ``state`` has no more of the old one.
        Parameters may be on the CPU or a GPU, and the new one elsewhere than the old one.

        Examples
        --------
        Densify and prune, as in Gaussian splatting: rows that became transparent go, others are split in two.

        >>> means = torch.nn.Parameter(torch.zeros(5, 3))
        >>> optimizer = SparseAdam([means], lr=0.01)
        >>> means.grad = torch.ones(5, 3).to_sparse(1)
        >>> optimizer.step()
        >>> kept, split = torch.tensor([0, 2, 3]), torch.tensor([2])
        >>> rows = torch.cat([kept, split])
        >>> new_means = torch.nn.Parameter(means.detach()[rows])
        >>> fresh = torch.full_like(split, -1)  # or `split`: a copy goes on with the moments of its original
        >>> optimizer.rearrange(means, new_means, torch.cat([kept, fresh]))
        >>> optimizer.param_groups[0]["params"][0] is new_means
        True
        >>> optimizer.state[new_means]["exp_avg"][:, 0]
        tensor([0.1000, 0.1000, 0.1000, 0.0000])
        """
        with self.turn:
            g, i = groups.place_of(self.param_groups, old_param, new_param)
            group = self.param_groups[g]
            name = groups.name_of(group, g, i)
            check_replacement(name, old_param, new_param)
            self.synchronize()
            entry, param_state = self.state.get(old_param), self._param_states.get(old_param)
            renewed: ParamState | None = None
            if has_state(entry):
                arranged = rearranged(name, entry, source, new_param, group["step_counts"])
                sparse_dim = 1 if param_state is None else param_state.sparse_dim
                renewed = ParamState(name, new_param, sparse_dim, group["step_counts"], after=param_state)
                renewed.check_load(arranged)()
            else:
                source_of(name, source, len(new_param), len(old_param))

            def exchange() -> None:
                group["params"][i] = new_param
                if entry is not None:
                    self.state[new_param] = entry
                if renewed is not None:
                    self.has_stepped(new_param, renewed)
                if new_param is not old_param:
                    self.state.pop(old_param, None)
                    self._param_states.pop(old_param, None)

            try:
                exchange()
            finally:  # an interrupt that came in between is raised when all has been exchanged
                exchange()

    def __copy__(self) -> SparseAdam:
        """Another optimizer of the same parameters."""
        made = type(self).__new__(type(self))
        with self.turn:
            made.__setstate__(self._state_now())
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseAdam:
        """An optimizer of copies of the parameters; of those that have been copied before, if there are.

        They all are given the values of the moment: a step may have come since they were copied.
        """
        made = memo[id(self)] = type(self).__new__(type(self))
        with self.turn:
            copied = {id(each) for each in memo.get(id(memo), ())}  # by copy.deepcopy, which keeps them alive
            states = self._param_states.items()
            before = [param for param, each in states if each.is_shown and id(param) in copied]
            made.__setstate__(copy.deepcopy(self._state_now(), memo))
            set_values({memo[id(param)]: param for param in before})
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle writes: parameters and state of one moment, even if another thread steps.

        The parameters are part of it, so that they stay the same objects as elsewhere in the pickle. But
        pickle writes them later, when a step may have changed them; so their values are part of it too, which
        takes their size twice.
        """
        with self.turn:
            state, is_sent = self._state_now(), get_spawning_popen() is not None
            # A process that is being spawned receives handles to shared memory, which must last until it has
            # started.
            self._sent = state["state"] if is_sent else None
            if not is_sent:
                state["_values"] = {
                    param: param.detach().clone()
                    for param, each in self._param_states.items()
                    if each.is_shown and not is_in_shared_memory(param)
                }
            return state

    def _state_now(self) -> dict[str, Any]:
        self.synchronize()
        copied = defaultdict(dict, {key: plain_copy(entry) for key, entry in list(self.state.items())})
        return {**super().__getstate__(), "state": copied, "_device_checks": self._device_checks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state: what unpickling, `copy.deepcopy` and `load_state_dict` end in."""
        state = dict(state)
        values = state.pop("_values", {})
        if "turn" not in self.__dict__:
            self.turn = locks.new_lock(self, "turn", outer=True)
        with self.turn:
            self._take_over(state)
            set_values(values)

    def _take_over(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups")
        known: Mapping[Tensor, ParamState] = {} if before is None else self._param_states
        if before is not None:
            self.synchronize()
        param_states: dict[Tensor, ParamState] = {}
        loads: list[Callable[[], None]] = []
        for g, group in enumerate(state["param_groups"]):
            groups.complete(group, g, None if before is None else before[g])
            for i, param in enumerate(group["params"]):
                entry = state["state"].get(param)
                if has_state(entry):
                    before_load = known.get(param)
                    sparse_dim = min(1 if before_load is None else before_load.sparse_dim, param.dim())
                    name = groups.name_of(group, g, i)
                    param_state = ParamState(name, param, sparse_dim, group["step_counts"], after=before_load)
                    loads.append(param_state.check_load(entry))
                    param_states[param] = param_state
        # One assignment. What an interrupt leaves to be done after it, the next step does: entries that are
        # not those of `_param_states` are taken over.
        super().__setstate__({**state, "_param_states": param_states})
        for (param, param_state), load in zip(param_states.items(), loads, strict=True):
            load()
            self.has_stepped(param, param_state)
        if before is None:
            self._register_hooks()
