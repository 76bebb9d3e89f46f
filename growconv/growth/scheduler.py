"""GrowthScheduler: the one object that a training loop talks to."""

import logging
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from growconv.errors import CheckpointError
from growconv.growth.amount import Amount, as_amount
from growconv.growth.amplitude import choose_amplitude, rescaled
from growconv.growth.cost import ModelCost
from growconv.growth.decision import Policy, Proposal, Situation
from growconv.growth.distributed import (
    agreed,
    from_first,
    mean_over_ranks,
    require_equal_parameters,
    require_same,
    world_size,
)
from growconv.growth.history import GrowthHistory
from growconv.growth.learning_rate import LearningRate
from growconv.growth.preservation import all_or_nothing, undisturbed
from growconv.growth.proposing import (
    PHASES,
    Batch,
    Collection,
    Loss,
    Stopwatch,
    channel_cost,
    propose,
    split,
    what_was_seen,
)
from growconv.growth.pruning import PruneBack, energy_scores, norm_scores
from growconv.growth.settings import (
    as_amplitude,
    as_optimizer_state,
    as_relative_error,
    as_share,
    as_when,
    check_gains,
    check_owner,
    checked_batches,
    checked_sites,
)
from growconv.growth.stop import Budget, Stop
from growconv.growth.validation import check_schedule
from growconv.growth.when import When, require_positive
from growconv.growth.where import Where, as_where
from growconv.network.graph import unwrapped
from growconv.network.growing import plan_size
from growconv.network.optimizer import as_optimizers, follow_ages
from growconv.network.proposal import ChannelGrowth
from growconv.network.rank_site import RankSite
from growconv.network.site import GrowthSite
from growconv.network.surgery import GrowthEvent, grow, shrink
from growconv.solvers.base import Channels, Solver, get_solver

logger = logging.getLogger("growconv.growth")


class GrowthScheduler:
    """Decides when a model grows, where, by how much and how strongly, and does it.

    A loop asks `due` after every optimizer step and calls `grow` when the answer is yes:

        scheduler = GrowthScheduler(model, optimizer, sites, method="tiny", every=500, times=8, amount=0.25)
        ...
        if scheduler.due(step, {"val_loss": val_loss}):
            scheduler.grow(growth_batches, loss)

    A round is all or nothing: what goes wrong inside `grow` leaves model, optimizer and history as they were. The
    model's mode, buffers, gradients and the random numbers of the training are never disturbed.

    Args:
        model: the raw model; unwrap data-parallel and compiled models, and wrap them again after each growth.
        optimizer: the optimizer that trains it, or a list of all that do; their state follows. None: there is none.
        sites: where the model may grow, from `find_sites` or `site`.
        method: name of a registered solver, or a Solver with its hyperparameters.
        every: optimizer steps between two rounds, the first after as many; short for when=Every(every).
        times: rounds at most, those that added nothing included; None: no limit.
        amount: channels per site and round: a float is a fraction of the site's initial width (0.25 is GradMax's), an
            int a number of channels, "auto" leaves it to the solver; or an Amount.
        where: "all", "best", "round_robin" or a Where.
        when: a When in place of `every`. Neither: `due` is never true, and `grow` is called by hand.
        stop: one Stop or several; the first that says so ends the growing.
        budget: a Budget; every round is cut to what fits into it.
        amplitude: γ, which multiplies the outgoing weights: "line_search" chooses it by the true loss on held-out
            growth batches; a number is taken as it is. Methods that preserve the function take 1.
        learning_rate: how new entries train after growth: None at the optimizer's rate, or WarmUp or StageRates.
        optimizer_state: "carried" keeps momentum and second moments of all old entries, new ones train as under a new
            optimizer; "fresh" forgets the state of every parameter after a round that grew,
            as a new optimizer would.
        pruning: a PruneBack that shrinks the model to a budget at its own times; None: nothing is ever pruned.
        held_out: share of the growth batches that the line search gets and the statistics do not.
        samples: "all" reads every growth batch that is left; "auto" only as many as it takes to know the sum of the
            gains at every site to `relative_error`, for methods whose gains are energies (tiny, exact, functional).
        relative_error: see `samples`.
        statistics: further options of `collect_statistics`, such as keep_samples (512 where the method reads samples).
        seed: of methods that draw random numbers, mixed with the number of the round.

    Attributes:
        history: what has grown so far.
        spent: wall-clock seconds so far by phase: collect, solve, amplitude, surgery.
        flops_spent: FLOPs (2 × MACs, backward counted twice the forward) of all growth passes of this process so far.
        decisions: what the policies decided at the last question, and why.

    Raises:
        ScheduleError: settings that contradict each other or make no sense.
        SurgeryError: an optimizer that does not own the sites' parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        sites: Sequence[GrowthSite],
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
        self.sites = checked_sites(sites, self.model, self.solver)
        self.when = as_when(every, when)
        self.times = times
        self.amount = as_amount(amount)
        self.where = as_where(where)
        self.stops: list[Stop] = [*([stop] if isinstance(stop, Stop) else stop), *([] if budget is None else [budget])]
        self.amplitude = as_amplitude(amplitude)
        self.learning_rate = learning_rate
        self.optimizer_state = as_optimizer_state(optimizer_state)
        self.pruning = pruning
        self.held_out = as_share(held_out, "held_out")
        error = as_relative_error(samples, relative_error, self.solver, self.sites)
        self.collection = Collection(dict(statistics or {}), error)
        self.seed = seed
        check_owner(optimizer, self.sites)
        check_gains(self.solver, self._policies().values())
        if times is not None:
            require_positive(self, "times", times)
        if learning_rate is not None:
            learning_rate.attach(as_optimizers(optimizer))

        self.history = GrowthHistory()
        self.spent: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.flops_spent = 0.0
        self.decisions: list[str] = []
        self._initial_widths = {site.name: site.width for site in self.sites}
        self._visits = dict.fromkeys(self._initial_widths, 0)
        self._rounds = 0
        self._step = 0
        self._metrics: dict[str, float | int] = {}
        self._last_step: int | None = None
        self._last_epoch: int | None = None
        self._last_pruning: int | None = None
        self._prunes = False
        self._cost: ModelCost | None = None
        self._began = time.monotonic()
        self._seconds_before = 0.0

    @property
    def rounds(self) -> int:
        """Growth rounds so far, those that added nothing included."""
        return self._rounds

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the schedule began, resumed parts included."""
        return self._seconds_before + time.monotonic() - self._began

    def due(self, step: int, metrics: Mapping[str, float | int] | None = None) -> bool:
        """Whether a growth round is due; True stays true until `grow` was called.

        Args:
            step: optimizer steps done so far.
            metrics: numbers that policies may read (val_loss, val_accuracy, ...); "epoch" counts finished epochs.
                With several processes, rank 0's count.

        Returns:
            Whether to call `grow` now; the same answer on every rank.
        """
        follow_ages(as_optimizers(self.optimizer), changed=False)  # an optimizer that was loaded meanwhile
        self._step, self._metrics = step, dict(metrics or {})
        situation = self._situation()
        yes, self.decisions = self._decide(situation)
        self._prunes = self._pruning_due(situation)
        if world_size() > 1 and self._personal:
            yes, self._prunes = from_first(lambda: (yes, self._prunes), self._device)
        yes = yes or self._prunes
        if yes:
            logger.info("growth is due at step %d: %s", step, "; ".join(self.decisions))
        return yes

    def grow(self, batches: Iterable[Any], loss: Loss, step: int | None = None) -> list[GrowthEvent]:
        """Do one round: collect, solve, choose, apply; or prune, where the last answer of `due` was about pruning.

        Args:
            batches: growth batches, (inputs, targets) pairs; inputs are a tensor, a tuple of positional or a mapping of
                keyword arguments of the model. With several processes, each passes its own, equally many.
            loss: loss(output, targets), a scalar averaged over the batch.
            step: optimizer steps done so far; None: those of the last call of `due`.

        Returns:
            One event per site that changed, already in the history; none when nothing was worth growing.

        Raises:
            GrowthError: what went wrong; model, optimizer and history are as before.
        """
        if step is not None:
            self._step = step
        fitting, held_out, cost = agreed(lambda: self._divided(batches))
        require_same((len(fitting), len(held_out)), "numbers of growth batches")
        if self._prunes:
            return self._prune(fitting, loss, cost)

        self.decisions = []
        situation = self._situation()
        asked = self._asked(situation)
        stopwatch = Stopwatch(self._device)
        events: list[GrowthEvent] = []
        if asked:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._rounds)
            with cost.counting() as spent, self._surgery():

                def ask(sites: Mapping[GrowthSite, Channels]) -> list[Proposal]:
                    return propose(
                        self.model, self.solver, sites, fitting, loss, cost, stopwatch, generator, self.collection
                    )

                for proposal, reason in self._chosen(ask(asked), situation):
                    growth = self._current(proposal, ask, moved=bool(events))
                    if growth is not None:
                        event = self._apply(proposal.site, growth, reason, held_out, loss, stopwatch)
                        shown = what_was_seen(growth, self.solver, proposal)
                        events.append(replace(event, details={**event.details, **shown}))
                require_equal_parameters(self.model)
            self.flops_spent += spent.flops
        for site in asked:
            self._visits[site.name] += 1
        self._rounds += 1
        self._last_step = self._step
        self._last_epoch = int(self._metrics["epoch"]) if "epoch" in self._metrics else self._last_epoch
        return self._record(events, stopwatch)

    def explain(self) -> str:
        """What was decided at the last question or in the last round, one line each."""
        return "\n".join(self.decisions)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs besides model and optimizer, as JSON-able values."""
        return {
            "initial_widths": dict(self._initial_widths),
            "widths": {site.name: site.width for site in self.sites},
            "visits": dict(self._visits),
            "rounds": self._rounds,
            "last_step": self._last_step,
            "last_epoch": self._last_epoch,
            "last_pruning": self._last_pruning,
            "seconds": self.seconds,
            "spent": dict(self.spent),
            "flops_spent": self.flops_spent,
            "policies": {name: policy.state_dict() for name, policy in self._policies().items()},
            "history": [event.to_dict() for event in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the model must have its grown shapes already (`history.replay`).

        Args:
            state: what `state_dict` gave, also after a trip through JSON.

        Raises:
            CheckpointError: the state is damaged, of another schedule or another model; nothing has changed then.
        """
        self.check_state_dict(state)
        for name, policy in self._policies().items():
            policy.load_state_dict(state["policies"][name])
        self.history = GrowthHistory.from_records(state["history"])
        self.spent = {phase: float(state["spent"][phase]) for phase in PHASES}
        self.flops_spent = float(state["flops_spent"])
        self._initial_widths = dict(state["initial_widths"])
        self._visits = dict(state["visits"])
        self._rounds = int(state["rounds"])
        self._last_step, self._last_epoch = state["last_step"], state["last_epoch"]
        self._last_pruning = state["last_pruning"]
        if self.learning_rate is not None:
            self.learning_rate.follow(self.model, self.history)
        self._seconds_before, self._began = float(state["seconds"]), time.monotonic()

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare a state with this schedule and its model, whose shapes are grown already; nothing is changed.

        Args:
            state: as for `load_state_dict`.

        Raises:
            CheckpointError: what does not fit.
        """
        policies = self._policies()
        check_schedule(state, PHASES, policies)
        GrowthHistory.from_records(state["history"])
        for what, expected, got in (
            ("sites", sorted(self._initial_widths), sorted(state["initial_widths"])),
            ("visits", sorted(self._visits), sorted(state["visits"])),
            ("policies", sorted(policies), sorted(state["policies"])),
            ("widths", {site.name: site.width for site in self.sites}, dict(state["widths"])),
        ):
            if expected != got:
                raise CheckpointError(
                    f"the saved schedule has other {what}",
                    expected=expected,
                    got=got,
                    where="GrowthScheduler.load_state_dict",
                    fix="build model and schedule with the run's settings and replay the history before loading",
                )

    def __str__(self) -> str:
        widths = ", ".join(f"{site.name}: {self._initial_widths[site.name]} → {site.width}" for site in self.sites)
        limit = "" if self.times is None else f" of {self.times}"
        return (
            f"GrowthScheduler({self.solver.name}): {self._rounds}{limit} rounds, {len(self.history)} events; {widths}"
        )

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _personal(self) -> bool:
        """Whether a policy reads the clock or metrics, which differ from rank to rank."""
        return any(policy.personal for policy in self._policies().values())

    def _policies(self) -> dict[str, Policy]:
        named: dict[str, Policy] = {"amount": self.amount, "where": self.where}
        if self.when is not None:
            named["when"] = self.when
        if self.learning_rate is not None:
            named["learning_rate"] = self.learning_rate
        if self.pruning is not None:
            named["pruning"] = self.pruning
        return named | {f"stop{index}": policy for index, policy in enumerate(self.stops)}

    def _situation(self) -> Situation:
        return Situation(
            step=self._step,
            metrics=self._metrics,
            model=self.model,
            sites=self.sites,
            initial_widths=self._initial_widths,
            visits=self._visits,
            rounds=self._rounds,
            last_step=self._last_step,
            last_epoch=self._last_epoch,
            seconds=self.seconds,
            cost=self._cost,
        )

    def _decide(self, situation: Situation) -> tuple[bool, list[str]]:
        """Ask every policy, so that each one sees every report."""
        stops = [policy.decide(situation) for policy in self.stops]
        when = None if self.when is None else self.when.decide(situation)
        over = next((stop for stop in stops if stop), None)
        if self.times is not None and self._rounds >= self.times:
            return False, [f"all {self.times} rounds are done"]
        if over is not None:
            return False, [over.reason]
        if when is None:
            return False, ["no schedule was given: call grow when it suits"]
        return when.yes, [when.reason]

    def _divided(self, batches: Iterable[Any]) -> tuple[list[Batch], list[Batch], ModelCost]:
        """Growth batches to fit and to choose the amplitude on, and the cost meter, which the first of them sets up."""
        with undisturbed(self.model):
            data = checked_batches(batches)
        if self._cost is None:
            self._cost = ModelCost.measure(self.model, data[0][0])
        searching = self.amplitude == "line_search" and not self.solver.function_preserving and not self._prunes
        fitting, held_out = split(data, self.held_out) if searching else (data, [])
        return fitting, held_out, self._cost

    def _pruning_due(self, situation: Situation) -> bool:
        if self.pruning is None:
            return False
        answer = self.pruning.when.decide(replace(situation, last_step=self._last_pruning))
        if answer:
            self.decisions = [f"prune: {answer.reason}"]
        return answer.yes

    def _prune(self, batches: Sequence[Batch], loss: Loss, cost: ModelCost) -> list[GrowthEvent]:
        """Shrink to the pruning policy's budget."""
        pruning = self.pruning
        if pruning is None:
            return []
        stopwatch, events = Stopwatch(self._device), []
        with stopwatch.phase("collect"), undisturbed(self.model), cost.counting() as spent:
            sites = [site for site in self.sites if not isinstance(site, RankSite)]
            if pruning.score == "energy":
                scores = energy_scores(self.model, sites, batches, loss, self.collection.options)
            else:
                scores = {site: norm_scores(site) for site in sites}
            chosen = pruning.choose(self.model, sites, scores, cost)
        self.decisions = []
        with self._surgery(), stopwatch.phase("surgery"):
            for site, channels in chosen.items():
                event = shrink(self.model, site, channels, optimizer=self.optimizer)
                events.append(replace(event, step=self._step, reason=f"pruned back by {pruning.score}"))
                self._note(str(events[-1]))
            require_equal_parameters(self.model)
        self.flops_spent += spent.flops
        self._last_pruning, self._prunes = self._step, False
        return self._record(events, stopwatch)

    @contextmanager
    def _surgery(self) -> Iterator[None]:
        """Changes to model and optimizer that happen as a whole or not at all."""
        logs = {id(site.spaces.log): site.spaces.log for site in self.sites}.values()
        states = {name: policy.state_dict() for name, policy in self._policies().items()}
        try:
            with all_or_nothing(self.model, as_optimizers(self.optimizer), logs):
                yield
        except BaseException:
            for name, policy in self._policies().items():
                policy.load_state_dict(states[name])
            raise

    def _asked(self, situation: Situation) -> dict[GrowthSite, Channels]:
        """How many channels to ask for at which sites of this round."""
        asked: dict[GrowthSite, Channels] = {}
        for site in self.where.candidates(self.sites, situation):
            channels = self.amount.channels(site, situation)
            if channels == 0:
                self._note(f"{site.name}: has the width that was asked for, {site.width}")
            else:
                asked[site] = channels
        return asked

    def _chosen(self, proposals: Sequence[Proposal], situation: Situation) -> list[tuple[Proposal, str]]:
        """The proposals that every policy agrees to."""
        for policy in self.stops:
            policy.observe(proposals)
        over = next((answer for policy in self.stops if (answer := policy.decide(situation))), None)
        if over is not None:
            self._note(f"nothing grows: {over.reason}")
            return []
        admitted = []
        for proposal in proposals:
            if not proposal.growth.channels:
                self._note(f"{proposal.site.name}: no channel is worth adding, {proposal.growth.reason}")
                continue
            answer = self.when.admits(proposal) if self.when is not None else None
            if answer is not None and not answer:
                self._note(f"{proposal.site.name}: {answer.reason}")
            else:
                admitted.append(proposal)
        return self.where.choose(admitted, *self._room(situation))

    def _room(self, situation: Situation) -> tuple[float | int, float | int]:
        rooms = [policy.room(situation) for policy in self.stops] or [(math.inf, math.inf)]
        return min(room[0] for room in rooms), min(room[1] for room in rooms)

    def _current(
        self, proposal: Proposal, ask: Callable[[Mapping[GrowthSite, Channels]], list[Proposal]], moved: bool
    ) -> ChannelGrowth | None:
        """The proposal as it can be applied now; None where the budget has no room for a channel.

        A method that changes old weights computed the changes from weights and for a number of channels that may have
        changed since: it is asked again where a neighbour has grown in this round or the budget cut the number.
        """
        growth = self._cut(proposal)
        if growth is not None and growth.revised and (moved or growth is not proposal.growth):
            growth = ask({proposal.site: growth.channels})[0].growth
            if not growth.channels:
                self._note(f"{proposal.site.name}: no channel is worth adding any more, {growth.reason}")
                return None
        return growth

    def _apply(
        self,
        site: GrowthSite,
        growth: ChannelGrowth,
        reason: str,
        held_out: Sequence[Batch],
        loss: Loss,
        stopwatch: Stopwatch,
    ) -> GrowthEvent:
        """Put one proposal into the model."""
        growth = rescaled(site, growth)
        # new weights that belong together with changes of old ones have no amplitude of their own
        amplitude: float = self.amplitude if isinstance(self.amplitude, float) and not growth.revised else 1.0
        decrease, details = None, {}
        if held_out and not growth.revised and growth.copied_from is None:
            with stopwatch.phase("amplitude"), undisturbed(self.model):
                choice = choose_amplitude(self.model, site, growth, held_out, self._shared(loss))
            amplitude, decrease = choice.amplitude, choice.decrease
            details = {"losses": sorted([list(pair) for pair in choice.losses.items()]), "cap": choice.cap}
            self._note(f"{site.name}: amplitude {amplitude:.3g}, {choice.reason}")
        with stopwatch.phase("surgery"):
            event = grow(self.model, site, growth, amplitude=amplitude, optimizer=self.optimizer)
        event = replace(
            event,
            step=self._step,
            realised_decrease=decrease,
            details={**event.details, **details},
            reason="; ".join(part for part in (reason, growth.reason) if part),
        )
        self._note(str(event))
        return event

    def _cut(self, proposal: Proposal) -> ChannelGrowth | None:
        """The proposal with as many channels as the amount's maximum and the budget allow now, in whole groups."""
        growth, size = proposal.growth, proposal.site.granularity
        parameters, flops = self._room(self._situation())
        groups = range(size, growth.channels + 1, size)
        flops_per_channel = channel_cost(proposal.site, self._cost)[1] if self._cost and flops < math.inf else 0.0
        limits = {
            "the budget of parameters": bisect_right(groups, parameters, key=lambda k: plan_size(proposal.site, k)),
            "the budget of FLOPs": bisect_right(groups, flops, key=lambda k: k * flops_per_channel),
            "the maximum of a round": bisect_right(
                groups, math.inf if self.amount.maximum is None else self.amount.maximum
            ),
        }
        limit = min(limits, key=lambda name: limits[name])
        if limits[limit] == len(groups):
            return growth
        fitting = limits[limit] * size
        if fitting == 0:
            self._note(f"{proposal.site.name}: {limit} has no room for {size} more channel{'s' if size > 1 else ''}")
            return None
        return growth.subset(range(fitting), f"{limit} has room for {fitting} of {growth.channels} channels")

    def _record(self, events: Sequence[GrowthEvent], stopwatch: Stopwatch) -> list[GrowthEvent]:
        """Close the round: its seconds are shared evenly among its events."""
        shares = {phase: value / max(len(events), 1) for phase, value in stopwatch.seconds.items()}
        recorded = [
            replace(event, seconds=sum(shares.values()), details={**event.details, "seconds": shares})
            for event in events
        ]
        for event in recorded:
            self.history.append(event)
        for phase, value in stopwatch.seconds.items():
            self.spent[phase] += value
        if recorded and self.learning_rate is not None:
            self.learning_rate.follow(self.model, self.history)
        if recorded and self.optimizer_state == "fresh":
            for optimizer in as_optimizers(self.optimizer):
                optimizer.state.clear()
        return recorded

    def _shared(self, loss: Loss) -> Loss:
        """The loss averaged over the processes, so that all of them choose the same amplitude."""
        if world_size() == 1:
            return loss
        return lambda output, targets: mean_over_ranks(loss(output, targets))

    def _note(self, text: str) -> None:
        self.decisions.append(text)
        logger.info("%s", text)
