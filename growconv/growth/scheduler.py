"""GrowthScheduler: the one object that a training loop talks to."""

import copy
import logging
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from growconv.errors import CheckpointError, ScheduleError
from growconv.growth.amount import Amount, Auto, as_amount, too_wide
from growconv.growth.amplitude import CAP
from growconv.growth.cost import ModelCost
from growconv.growth.decision import Batch, Decision, Loss, Policy, Proposal, Situation
from growconv.growth.distributed import agreed, from_first, require_equal_parameters, require_same, world_size
from growconv.growth.learning_rate import LearningRate
from growconv.growth.pruning import PruneBack
from growconv.growth.round import PHASES, Round, divided
from growconv.growth.settings import (
    LeftOut,
    as_amplitude,
    as_relative_error,
    as_when,
    check_gains,
    check_limits,
    check_owner,
    checked_sites,
)
from growconv.growth.stop import Budget, Stop
from growconv.growth.validation import check_schedule, history_from
from growconv.growth.when import When, fallen
from growconv.growth.where import Where, as_where
from growconv.network.blocks import IN_FRONT, path_before
from growconv.network.entry_ages import follow_ages
from growconv.network.event import GrowthEvent, GrowthHistory, Optimizers
from growconv.network.model import undisturbed, unwrapped
from growconv.network.optimizer import Journal, as_optimizers
from growconv.network.site import GrowthSite, Site
from growconv.solvers.base import Channels, Solver, get_solver, require_count, solver_of
from growconv.statistics.flops import FlopMeter

logger = logging.getLogger("growconv.growth")

KEPT = ("initial_widths", "visits", "rounds", "last_step", "last_epoch", "last_pruning")
"""What a resumed run needs of the situation."""


class GrowthScheduler:
    """Decides when a model grows, where, by how much and how strongly, and does it.

    A loop asks `due` after every optimizer step and calls `grow` when the answer is yes:

        scheduler = GrowthScheduler(model, optimizer, sites, method="tiny", every=500, times=8, amount=0.25)
        ...
        if scheduler.due(step, {"val_loss": val_loss}):
            scheduler.grow(growth_batches, loss)

    A round is all or nothing: an error or interrupt inside `grow` leaves model, optimizer and history as they were. The
    model's mode, buffers, gradients and the random numbers of the training are never disturbed. A deep copy or a pickle
    of (model, optimizer, scheduler) goes on by itself.

    Args:
        model: the raw model; unwrap data-parallel and compiled models, and wrap them again after each growth.
        optimizer: the optimizer that trains it, or a list of all such optimizers; their state follows. None: there is
            none.
        sites: where the model may grow. Sites of `find_sites` that the method cannot serve are left out, with one
            warning that names them; a site of `growconv.site` that it cannot serve is an error.
        method: name of a registered solver, or a Solver with its hyperparameters.
        every: optimizer steps between two rounds and before the first one; short for when=Every(every).
        times: the most rounds, including those that add nothing; None: no limit. Needs a schedule.
        amount: channels per site and round: a float is a fraction of the site's initial width (0.25 is GradMax's), an
            int a number of channels, "auto" leaves it to the solver; or an Amount.
        where: "all", "best", "round_robin" or a Where.
        when: a When instead of `every`. With neither, the loop calls `grow` whenever it likes; calling `due`, limiting
            `times` or using a trainer's callback without a schedule is then an error.
        stop: one Stop or several; the first one that applies ends the growth.
        budget: a Budget; every round is cut to what fits into it.
        amplitude: γ, the factor on the outgoing weights: "line_search" chooses it by the true loss on held-out
            growth batches; a number is used as it is. For methods that preserve the function it is 1.
        amplitude_cap: how strong the search may make the strongest new channel, relative to the mean of the old ones;
            None: no limit, as in TINY. 1 was the best at the end of training (the benchmark `amplitude`).
        learning_rate: how new entries train: None for the optimizer's rate; or WarmUp, StageRates or WidthRates.
        optimizer_state: "carried" keeps momentum and second moments of all old entries, and new ones train as under a
            new optimizer; "fresh" resets the state of every parameter after a round that grew,
            as a new optimizer would.
        pruning: a PruneBack that shrinks the model to a budget at its own times; None: nothing is ever pruned.
        held_out: share of the growth batches reserved for the line search, so that the statistics do not see them.
        samples: "all" reads every remaining growth batch; "auto" only as many as it takes to know the sum of the
            gains at every site to within `relative_error`, for methods whose gains are energies (tiny, exact,
            functional).
        relative_error: see `samples`.
        statistics: further options of `collect_statistics`, such as keep_samples (512 if the method reads samples).
        seed: seed of methods that draw random numbers, combined with the number of the round.

    Attributes:
        sites: the sites that are grown.
        left_out: sites that the method cannot serve, each with the reason.
        history: the growth so far; its events hold only names and numbers.
        spent: wall-clock seconds so far by phase: collect, solve, amplitude, surgery.
        flops_spent: FLOPs (2 × MACs) of all growth rounds of this process so far, solving included (`FlopMeter`).
        decisions: what the policies decided last, and why.

    Raises:
        ScheduleError: settings that contradict each other or make no sense, or no site that the method can serve.
        SurgeryError: an optimizer that does not own the sites' parameters.

    Warns:
        GrowthWarning: sites were left out.

    Example:
        >>> scheduler = growconv.GrowthScheduler(model, optimizer, sites, method="tiny", every=100, times=2, amount=2)
        >>> if scheduler.due(step=100):
        ...     events = scheduler.grow(batches, loss)
        >>> sites[0].width
        6
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        sites: Iterable[Site],
        *,
        method: str | Solver = "tiny",
        every: int | None = None,
        times: int | None = None,
        amount: Amount | int | float | str = 0.25,
        where: Where | str = "all",
        when: When | None = None,
        stop: Stop | Sequence[Stop] = (),
        budget: Budget | None = None,
        amplitude: float | int | str = "line_search",
        amplitude_cap: float | int | None = CAP,
        learning_rate: LearningRate | None = None,
        optimizer_state: Literal["carried", "fresh"] | str = "carried",
        pruning: PruneBack | None = None,
        held_out: float | int = 0.25,
        samples: Literal["all", "auto"] | str = "all",
        relative_error: float | int = 0.1,
        statistics: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.model = unwrapped(model)
        self.optimizer = optimizer
        self.solver = get_solver(method)
        self.sites: tuple[Site, ...]
        self.left_out: tuple[LeftOut, ...]
        self.sites, self.left_out = checked_sites(sites, self.model, self.solver)
        self.when = as_when(every, when)
        self.times = times
        self.amount = as_amount(amount)
        if isinstance(self.amount, Auto):
            require_count(self.solver, "amount", ScheduleError)
        self.where = as_where(where)
        self.stops: list[Stop] = [*([stop] if isinstance(stop, Stop) else stop), *([] if budget is None else [budget])]
        self.amplitude: float | Literal["line_search"] = as_amplitude(amplitude)
        check_limits(amplitude_cap=amplitude_cap, optimizer_state=optimizer_state, held_out=held_out)
        check_limits(samples=samples, relative_error=relative_error, times=times)
        self.amplitude_cap = None if amplitude_cap is None else float(amplitude_cap)
        self.learning_rate, self.pruning, self.optimizer_state = learning_rate, pruning, optimizer_state
        self.held_out = float(held_out)
        self.relative_error = as_relative_error(samples, relative_error, self.solver, self.sites)
        searched = self.amplitude == "line_search" and not self.solver.function_preserving
        closed_form = all(site.closed_form for site in self.sites)
        self.measured = self.where.measures(searched=searched, closed_form=closed_form)
        self.statistics = dict(statistics or {})
        self.seed = seed
        check_owner(optimizer, self.sites)
        compared = [each for each in self._policies().values() if each is not self.where or self.measured is None]
        check_gains(self.solver, compared, self.sites)
        if times is not None:
            self.require_schedule("times limits a schedule", growth=True)
        if learning_rate is not None:
            learning_rate.attach(as_optimizers(optimizer))
        self._begin()

    def _begin(self) -> None:
        """Nothing has happened yet."""
        widths = {site.name: site.width for site in self.sites}
        self.now = Situation(0, {}, self.model, self.sites, widths, visits=dict.fromkeys(widths, 0))
        self.history = GrowthHistory()
        self.spent: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.flops_spent = 0.0
        self.decisions: list[str] = []
        self._prunes = False
        self._top_rate = 0.0
        self._began = time.monotonic()
        self._seconds_before = 0.0

    @property
    def rounds(self) -> int:
        """Growth rounds so far, including those that added nothing."""
        return self.now.rounds

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the schedule began, resumed parts included."""
        return self._seconds_before + time.monotonic() - self._began

    def due(self, step: int, metrics: Mapping[str, float | int] | None = None) -> bool:
        """Whether a growth round is due; True stays true until `grow` was called.

        Args:
            step: optimizer steps done so far.
            metrics: numbers that policies may read (val_loss, val_accuracy, ...); "epoch" counts finished epochs.
                With several processes, those of rank 0 are used.

        Returns:
            Whether to call `grow` now; the same answer on every rank.

        Raises:
            ScheduleError: the scheduler was made without a schedule.
        """
        self.require_schedule("due() asks a schedule")
        follow_ages(as_optimizers(self.optimizer), changed=False)  # an optimizer that was loaded meanwhile
        self.now = replace(self.now, step=step, metrics=dict(metrics or {}), seconds=self.seconds)
        self._top_rate = max(self._top_rate, self._rate)
        yes, self._prunes, self.decisions = self._decide()
        if world_size() > 1 and any(policy.personal for policy in self._policies().values()):
            device = next(self.model.parameters()).device
            yes, self._prunes = from_first(lambda: (yes, self._prunes), device)
        if yes := yes or self._prunes:
            logger.info("growth is due at step %d: %s", step, "; ".join(self.decisions))
        return yes

    def grow(self, batches: Iterable[Any], loss: Loss, step: int | None = None) -> list[GrowthEvent]:
        """Do one round: collect, solve, choose, apply; or prune, if the last answer of `due` was about pruning.

        Args:
            batches: growth batches, (inputs, targets) pairs; inputs are a tensor, a tuple of positional or a mapping of
                keyword arguments of the model. With several processes, each passes its own, the same number.
            loss: loss(output, targets), a scalar averaged over the batch.
            step: optimizer steps done so far; None: as in the last call of `due`.

        Returns:
            One event per site that changed, already in the history; none if nothing was worth growing.

        Raises:
            GrowthError: what went wrong; model, optimizer and history are as before.
        """
        with _all_or_nothing(self):
            self.now = replace(self.now, step=self.now.step if step is None else step, seconds=self.seconds)
            fitting, held_out, cost = agreed(partial(self._divided, batches))
            require_same((len(fitting), len(held_out)), "numbers of growth batches")
            self.now, self.decisions = replace(self.now, cost=cost), []
            work = Round(
                model=self.model,
                optimizer=self.optimizer,
                solver=self.solver,
                amplitude=1.0 if isinstance(self.amplitude, str) else self.amplitude,
                amplitude_cap=self.amplitude_cap,
                statistics=self.statistics,
                relative_error=self.relative_error,
                slopes=self.measured == "slopes",
                fitting=fitting,
                held_out=held_out,
                loss=loss,
                cost=cost,
                generator=torch.Generator().manual_seed(self.seed * 1_000_003 + self.rounds),
                step=self.now.step,
                maximum=self.amount.maximum,
                room=self._room,
                note=self._note,
            )
            asked: Iterable[Site] = ()
            with FlopMeter() as spent:
                if self._prunes and self.pruning is not None:
                    work.prune(self.pruning, self.sites)
                else:
                    asked = self._grown(work)
            require_equal_parameters(self.model)
            return self._record(work, asked, spent.flops)

    def require_schedule(self, why: str, growth: bool = False) -> None:
        """Refuse, because of `why`, a scheduler without a schedule: for growth, or unless `growth` for pruning."""
        if self.when is None and (growth or self.pruning is None):
            raise ScheduleError(
                f"{why}, and this scheduler has no schedule",
                expected="every=500, or a When such as when=AtSteps([500, 1000])",
                got="neither every nor when",
                where="GrowthScheduler",
                fix="give it one of them; to grow by hand, call grow() when it suits, without times and without due()",
            )

    def follow_model(self, sites: Iterable[Site], events: Iterable[GrowthEvent] = ()) -> None:
        """Continue with a model whose layers have changed, as after `insert_copy` or `insert_layer`.

        Args:
            sites: the sites of the changed model. What the schedule knows of a site is passed on to it, to its copies,
                and to the sites on both sides of a layer inserted into it; sites that it did not grow are left out.
            events: the changes to the model, for the history.
        """
        known = {_ends(each, self.model): each.name for each in self.sites}
        reading = {consumers: name for (_, consumers), name in reversed(known.items())}
        before: dict[str, str] = {}
        followed: list[Site] = []
        for site in sites:
            ends = _ends(site, self.model)
            around = frozenset(path.removesuffix(IN_FRONT) for path in ends[1])
            name = known.get(ends, reading.get(around))
            if name is not None:
                before[site.name] = name
                followed.append(site)
        self.sites, self.left_out = checked_sites(followed, self.model, self.solver)
        widths = {site.name: self.now.initial_widths[before[site.name]] for site in self.sites}
        visits = {site.name: self.now.visits[before[site.name]] for site in self.sites}
        self.now = replace(self.now, sites=self.sites, initial_widths=widths, visits=visits, cost=None)
        for event in events:
            self.history.append(replace(event, recipe=None))
        if self.learning_rate is not None:
            self.learning_rate.follow(self.model, self.history)

    def cautions(self) -> list[str]:
        """Warnings about the next round, as far as they are known beforehand; one line each."""
        asked = {site: self.amount.channels(site, self.now) for site in self.sites}
        wider = {site: site.width + channels for site, channels in asked.items() if isinstance(channels, int)}
        found = [text for site, width in wider.items() if (text := too_wide(site.name, site.width, width))]
        against: dict[str, list[str]] = {}
        for site in self.sites:
            if isinstance(site, GrowthSite) and (text := self.solver.caution(site)):
                against.setdefault(text, []).append(site.name)
        for text, names in against.items():
            where = names[0] if len(names) == 1 else f"{len(names)} sites"
            found.append(f"{self.solver.name} on {where}: {text}")
        return found

    def explain(self) -> str:
        """The schedule, warnings about it, and what was decided last; one line each."""
        rates = "the optimizer's learning rate" if self.learning_rate is None else repr(self.learning_rate)
        recipe = [repr(self), f"new entries train at {rates}; the optimizer's state is {self.optimizer_state}"]
        cautions = [] if self.times is not None and self.rounds >= self.times else self.cautions()
        return "\n".join([*recipe, *(f"caution: {text}" for text in cautions), *self.decisions])

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides model and optimizer, as JSON-able values."""
        return {
            **{name: getattr(self.now, name) for name in KEPT},
            "widths": {site.name: site.width for site in self.sites},
            "seconds": self.seconds,
            "spent": dict(self.spent),
            "flops_spent": self.flops_spent,
            "policies": {name: policy.state_dict() for name, policy in self._policies().items()},
            "history": [event.to_dict() for event in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where `state_dict` was taken; the model must already have its grown shapes (`history.replay`).

        Args:
            state: what `state_dict` returned, also after a round trip through JSON.

        Raises:
            CheckpointError: the state is damaged or belongs to another schedule or model; nothing has changed then.
        """
        self.check_state_dict(state)
        for name, policy in self._policies().items():
            policy.load_state_dict(state["policies"][name])
        self.history = history_from(state["history"])
        self.spent, self.flops_spent = dict(state["spent"]), float(state["flops_spent"])
        self.now = replace(self.now, **{name: state[name] for name in KEPT})
        if self.learning_rate is not None:
            self.learning_rate.follow(self.model, self.history)
        self._seconds_before, self._began = float(state["seconds"]), time.monotonic()
        follow_ages(as_optimizers(self.optimizer))

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare a state with this schedule and its model as `load_state_dict` does, and change nothing."""
        check_schedule(state, self._policies())
        history_from(state["history"])
        own = self.state_dict()
        names = {"sites": "initial_widths", "visits": "visits", "policies": "policies", "phases": "spent"}
        for what in (*names, "widths"):
            expected, got = (
                dict(each[what]) if what == "widths" else sorted(each[names[what]]) for each in (own, state)
            )
            if expected != got:
                raise CheckpointError(
                    f"the saved schedule has other {what}",
                    expected=expected,
                    got=got,
                    where="GrowthScheduler.load_state_dict",
                    fix="build model and schedule with the run's settings and replay the history before loading",
                )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: no clock of this process."""
        return {**vars(self), "_seconds_before": self.seconds}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Go on; copied and unpickled optimizers have lost their hooks."""
        vars(self).update(state)
        self._began = time.monotonic()
        follow_ages(as_optimizers(self.optimizer))
        if self.learning_rate is not None:
            self.learning_rate.attach(as_optimizers(self.optimizer))

    def __repr__(self) -> str:
        """What it will do, in one line."""
        when = "no schedule, by hand when grow() is called" if self.when is None else f"by {self.when!r}"
        every = getattr(self.when, "interval", None)
        if every is not None:
            when = f"every {every} {getattr(self.when, 'unit', 'step')}s"
        parts = [when, *([] if self.times is None else [f"{self.times} times"])]
        parts += [f"amount {self.amount!r}", f"where {self.where!r}", f"amplitude {self.amplitude}"]
        parts += [str(stop) for stop in self.stops] + ([] if self.pruning is None else [repr(self.pruning)])
        left = f", {len(self.left_out)} left out" if self.left_out else ""
        sites = f"{len(self.sites)} site{'' if len(self.sites) == 1 else 's'}{left}"
        return f"GrowthScheduler(method {self.solver.name!r}, {', '.join(parts)}; {sites})"

    def __str__(self) -> str:
        widths = ", ".join(f"{site.name}: {self.now.initial_widths[site.name]} → {site.width}" for site in self.sites)
        limit = "" if self.times is None else f" of {self.times}"
        return f"GrowthScheduler({self.solver.name}): {self.rounds}{limit} rounds, {len(self.history)} events; {widths}"

    @property
    def _rate(self) -> float:
        """The highest learning rate of the optimizers now."""
        groups = chain.from_iterable(optimizer.param_groups for optimizer in as_optimizers(self.optimizer))
        return max((float(group["lr"]) for group in groups), default=0.0)

    def _policies(self) -> dict[str, Policy]:
        named: dict[str, Policy | None] = {"amount": self.amount, "where": self.where, "when": self.when}
        named |= {"learning_rate": self.learning_rate, "pruning": self.pruning}
        named |= {f"stop{index}": policy for index, policy in enumerate(self.stops)}
        return {name: policy for name, policy in named.items() if policy is not None}

    def _decide(self) -> tuple[bool, bool, list[str]]:
        """Whether to grow, whether to prune, and why; every policy is asked, so that each one sees every report."""
        stops = [policy.decide(self.now) for policy in self.stops]
        answer = (
            Decision(False, "no schedule for growth was given") if self.when is None else self.when.decide(self.now)
        )
        answer = next((Decision(False, stop.reason) for stop in stops if stop), answer)
        if self.times is not None and self.rounds >= self.times:
            answer = Decision(False, f"all {self.times} rounds are done")
        if self.pruning is not None:
            pruning = self.pruning.when.decide(replace(self.now, last_step=self.now.last_pruning))
            if pruning:
                return answer.yes, True, [f"prune: {pruning.reason}"]
        return answer.yes, False, [answer.reason]

    def _divided(self, batches: Iterable[Any]) -> tuple[Sequence[Batch], Sequence[Batch], ModelCost]:
        """Growth batches to fit and to choose the amplitude on, and the cost meter, which the first of them sets up."""
        preserving = all(solver_of(site, self.solver).function_preserving for site in self.sites)
        searching = self.amplitude == "line_search" and not preserving and not self._prunes
        with undisturbed(self.model):
            fitting, held_out = divided(batches, self.held_out if searching else 0.0)
        return fitting, held_out, self.now.cost or ModelCost.measure(self.model, fitting[0][0])

    def _grown(self, work: Round) -> dict[Site, Channels]:
        """Ask, choose and apply; gives the sites that were asked."""
        asked: dict[Site, Channels] = {}
        for site in self.where.candidates(self.sites, self.now):
            channels = self.amount.channels(site, self.now)
            if channels == 0:
                self._note(f"{site.name}: has the width that was asked for, {site.width}")
            else:
                asked[site] = channels
        if asked:
            admitted = self._admitted(work.ask(asked))
            if self.measured == "decrease":
                admitted = [replace(proposal, decrease=work.decrease(proposal)) for proposal in admitted]
            work.take(self.where.choose(admitted, *self._room()))
        return asked

    def _admitted(self, proposals: Sequence[Proposal]) -> list[Proposal]:
        """The proposals that no policy but `where`, which chooses among them, has anything against."""
        for policy in self.stops:
            policy.observe(proposals)
        for policy in self.stops:
            over = policy.decide(self.now)
            if over:
                self._note(f"nothing grows: {over.reason}")
                return []
        admitted = []
        for proposal in proposals:
            if not proposal.growth.channels:
                self._note(f"{proposal.site.name}: no channel is worth adding, {proposal.growth.reason}")
                continue
            answer = Decision(True, "") if self.when is None else self.when.admits(proposal)
            if answer:
                admitted.append(proposal)
            else:
                self._note(f"{proposal.site.name}: {answer.reason}")
        return admitted

    def _room(self) -> tuple[float | int, float | int]:
        """The parameters and FLOPs that may still be added."""
        rooms = [policy.room(self.now) for policy in self.stops] or [(math.inf, math.inf)]
        return min(parameters for parameters, _ in rooms), min(flops for _, flops in rooms)

    def _record(self, work: Round, asked: Iterable[Site], flops: float | int) -> list[GrowthEvent]:
        """Close the round: its seconds are shared evenly among its events."""
        shares = {phase: value / max(len(work.events), 1) for phase, value in work.seconds.items()}
        events = []
        for event in work.events:
            event = replace(event, seconds=sum(shares.values()), details={**event.details, "seconds": shares})
            events.append(event)
            self.history.append(replace(event, recipe=None))
            self._caution(too_wide(event.site, event.width_before, event.width_after))
        self._caution(fallen(self._rate, self._top_rate) if events and not self._prunes else None)
        self.spent = {phase: self.spent[phase] + value for phase, value in work.seconds.items()}
        self.flops_spent += flops
        now, names = self.now, {site.name for site in asked}
        if self._prunes:
            self.now, self._prunes = replace(now, last_pruning=now.step), False
        else:
            visits = {name: count + (name in names) for name, count in now.visits.items()}
            epoch = int(now.metrics["epoch"]) if "epoch" in now.metrics else now.last_epoch
            self.now = replace(now, visits=visits, rounds=now.rounds + 1, last_step=now.step, last_epoch=epoch)
        if events and self.learning_rate is not None:
            self.learning_rate.follow(self.model, self.history)
        if events and self.optimizer_state == "fresh":
            for optimizer in as_optimizers(self.optimizer):
                optimizer.state.clear()
        return events

    def _caution(self, text: str | None) -> None:
        if text is not None:
            self.decisions.insert(0, f"caution: {text}")
            logger.warning("%s", text)

    def _note(self, text: str) -> None:
        self.decisions.append(text)
        logger.info("%s", text)


def _ends(site: Site, model: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
    """Producers and consumers by the paths that they had before blocks were copied and layers inserted."""
    producers, consumers = (
        frozenset(path_before(path, model) for path in paths) for paths in (site.producers, site.consumers)
    )
    return producers, consumers


@contextmanager
def _all_or_nothing(scheduler: GrowthScheduler) -> Iterator[None]:
    """An error or interrupt inside leaves scheduler, model, optimizers and random numbers as they were."""
    model, rates, own, events = scheduler.model, scheduler.learning_rate, dict(vars(scheduler)), [*scheduler.history]
    journal = Journal(model, as_optimizers(scheduler.optimizer), [*model.parameters(), *model.buffers()])
    policies = [(policy, copy.deepcopy(policy.state_dict())) for policy in scheduler._policies().values()]
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    stages = {} if rates is None else rates._stages
    try:
        yield
    except BaseException:
        journal.restore()
        vars(scheduler).update(own)
        scheduler.history.events[:] = events
        for policy, state in policies:
            policy.load_state_dict(state)
        if rates is not None:
            rates._stages = stages
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(pytorch)
        raise
