"""Thermal energy storage: when a chiller fills a cold store, hour by hour, so that the least CO2 is emitted.

Energy comes in whole numbers of the plant's units, so dynamic programming over the store's levels is exact.

Axes: H hour, S stored units, A action.
"""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np

from posttrain.chat.conversation import Conversation, Message
from posttrain.scoring.boltzmann import boltzmann
from posttrain.worlds.decisions import decision_task, open_choice
from posttrain.worlds.names import Split


@dataclass(frozen=True)
class Plant:
    unit_kwh: float
    """Energy of one unit; loads, store and output are whole numbers of it."""
    actions: int
    """Action n runs the chiller at n / (actions - 1) of its power for an hour."""
    step: int
    """Units of cold from one action to the next."""
    capacity: int
    """Units the store holds; the chiller stops when it is full."""
    hours: tuple[int, ...]
    cop: float
    """Cold out per electricity in."""
    penalty: float
    """kg of CO2 that a kWh of load not served counts as."""
    credit: float
    """Worth of cold left in the store, as a share of what making it at the day's mean factor emits."""
    tau: float
    """Temperature of the Boltzmann rewards, in kg of CO2."""


BUILDING = Plant(
    unit_kwh=1 / 3,
    actions=4,
    step=100,
    capacity=900,
    hours=tuple(range(8, 18)),
    cop=4.0,
    penalty=1.0,
    credit=0.5,
    tau=0.05,
)
"""100 kW and 300 kWh, loads in whole kWh."""
SMALL = Plant(
    unit_kwh=30.0,
    actions=4,
    step=1,
    capacity=9,
    hours=tuple(range(8, 18)),
    cop=4.0,
    penalty=0.2,
    credit=0.5,
    tau=0.3,
)
"""90 kW and 270 kWh, all in steps of 30 kWh: every number in its prompts is one digit, as a small model reads them.

The penalty is lower: the higher it is, the better does one action for all hours look.
"""
SMALL_FACTOR_STEP = 70
"""g per kWh: the dirtiest hours come to 9 steps."""


@dataclass(frozen=True)
class Day:
    """Loads in units and CO2 factors in g per kWh of electricity, known in advance for every hour of the plant."""

    number: int
    """Days after 2026-05-01."""
    loads: tuple[int, ...]
    factors: tuple[int, ...]


def draw_day(rng: random.Random, plant: Plant, load_units: int, factor_step: int) -> Day:
    """Load with a peak in the afternoon, factors with a dip around noon, in multiples of the two steps."""
    base, swing, dip = rng.uniform(20, 45), rng.uniform(0, 40), rng.uniform(50, 350)
    peak, noon = rng.uniform(12, 16), rng.uniform(11, 14)
    loads, factors = [], []
    for hour in plant.hours:
        kwh = max(0.0, base + swing * (1 - ((hour - peak) / 5) ** 2) + rng.gauss(0, 8))
        loads.append(load_units * round(kwh / plant.unit_kwh / load_units))
        grams = max(30.0, 480 - dip * max(0.0, 1 - ((hour - noon) / 4) ** 2) + rng.gauss(0, 40))
        factors.append(factor_step * round(grams / factor_step))
    return Day(rng.randrange(365), tuple(loads), tuple(factors))


# ---------------------------------------------------------------- simulator


def advance(plant: Plant, day: Day, place: int, stored: int, action: int) -> tuple[int, float]:
    """The store after hour `place` of the day, and the hour's cost in kg of CO2."""
    load = day.loads[place]
    made = min(action * plant.step, plant.capacity - stored + load)
    level = stored + made - load
    unserved = max(0, -level)
    emitted = made * plant.unit_kwh / plant.cop * day.factors[place] / 1000
    return max(0, level), emitted + plant.penalty * unserved * plant.unit_kwh


def terminal(plant: Plant, day: Day) -> float:
    """kg of CO2 that a unit left in the store is worth."""
    return plant.credit * float(np.mean(day.factors)) / 1000 / plant.cop * plant.unit_kwh


def action_values(plant: Plant, day: Day) -> np.ndarray:
    """[H, S, A]: minus the cost of the action and of the best ones after it, up to the credit at the end of the day."""
    stored_S1 = np.arange(plant.capacity + 1)[:, None]
    made_1A = np.arange(plant.actions)[None] * plant.step
    value_S = terminal(plant, day) * stored_S1[:, 0]
    values = np.empty((len(plant.hours), plant.capacity + 1, plant.actions))
    for place in reversed(range(len(plant.hours))):
        load = day.loads[place]
        made_SA = np.minimum(made_1A, plant.capacity - stored_S1 + load)
        level_SA = stored_S1 + made_SA - load
        emitted_SA = made_SA * (plant.unit_kwh / plant.cop * day.factors[place] / 1000)
        unserved_SA = np.maximum(0, -level_SA) * plant.unit_kwh
        values[place] = value_S[np.maximum(0, level_SA)] - emitted_SA - plant.penalty * unserved_SA
        value_S = values[place].max(axis=1)
    return values


Policy = Callable[[Plant, Day, int, int], int]
"""(plant, day, hour's place, stored units) → action."""


def day_value(plant: Plant, day: Day, policy: Policy, stored: int) -> float:
    """Minus the cost of a whole day under a policy, the credit for what it leaves included."""
    total = 0.0
    for place in range(len(plant.hours)):
        stored, cost = advance(plant, day, place, stored, policy(plant, day, place, stored))
        total -= cost
    return total + terminal(plant, day) * stored


# ---------------------------------------------------------------- rules to compare with


def optimal(plant: Plant, day: Day, place: int, stored: int) -> int:
    """The lowest of the best actions."""
    return int(action_values(plant, day)[place, stored].argmax())


def follow_load(plant: Plant, day: Day, place: int, stored: int) -> int:
    """The least output that serves the hour's load with what is stored."""
    missing = day.loads[place] - stored
    return min(plant.actions - 1, max(0, -(-missing // plant.step)))


def charge_when_clean(plant: Plant, day: Day, place: int, stored: int) -> int:
    """Full power while the factor is below the mean of the hours left, else as the load asks."""
    left = day.factors[place:]
    return plant.actions - 1 if day.factors[place] < sum(left) / len(left) else follow_load(plant, day, place, stored)


def full_power(plant: Plant, day: Day, place: int, stored: int) -> int:
    return plant.actions - 1


RULES: dict[str, Policy] = {
    "optimal": optimal,
    "charge_when_clean": charge_when_clean,
    "follow_load": follow_load,
    "full_power": full_power,
}


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class State:
    day: Day
    place: int
    """Of the hour in the day."""
    stored: int
    values: list[float]
    """Of every action."""

    @property
    def split(self) -> Split:
        """One in eight is held out, by all that decides it: late hours of different days can be the same state."""
        left = (self.stored, self.day.loads[self.place :], self.day.factors[self.place :])
        return "heldout" if zlib.crc32(repr(left).encode()) % 8 == 0 else "train"


def draw_state(rng: random.Random, split: Split, plant: Plant, load_units: int, factor_step: int) -> State:
    """An hour and a level of the store in which a best action drawn beforehand is the best: each is as often.

    Drawn evenly, doing nothing is best in half of all states, and a policy that learns only that looks good.
    """
    while True:
        day, wanted = draw_day(rng, plant, load_units, factor_step), rng.randrange(plant.actions)
        values_HSA = action_values(plant, day)
        fits_HS = values_HSA.argmax(axis=2) == wanted
        if not fits_HS.any():
            continue
        place = rng.choice(np.flatnonzero(fits_HS.any(axis=1)).tolist())
        stored = rng.choice(np.flatnonzero(fits_HS[place]).tolist())
        state = State(day, place, stored, values_HSA[place, stored].tolist())
        if state.split == split:
            return state


def _numbers(values: tuple[int, ...], scale: float) -> str:
    return " ".join(f"{value * scale:g}" for value in values)


def _described(plant: Plant, state: State) -> Conversation:
    day, place, stored = state.day, state.place, state.stored
    moment = date(2026, 5, 1) + timedelta(days=day.number)
    power = (plant.actions - 1) * plant.step * plant.unit_kwh
    shares = ", ".join(f"[{n}] {n * plant.step * plant.unit_kwh:.0f} kW" for n in range(plant.actions))
    text = (
        f"It is {moment} {plant.hours[place]}:00. The chiller makes up to {power:.0f} kW of cold at a COP of "
        f"{plant.cop:g}; the store holds {stored * plant.unit_kwh:.1f} of {plant.capacity * plant.unit_kwh:.0f} kWh. "
        f"The building needs cold until {plant.hours[-1] + 1}:00.\n"
        f"Load of this hour and the next ones in kWh: {_numbers(day.loads[place:], plant.unit_kwh)}\n"
        f"CO2 factor of this hour and the next ones in g/kWh: {_numbers(day.factors[place:], 1)}\n"
        f"Output of this hour: {shares}. Which one lets the rest of the day emit least? "
        f"A kWh not served counts as {plant.penalty:g} kg, cold left over at the end is worth "
        f"{plant.credit:.0%} of what it took on average."
    )
    return Conversation(
        messages=(Message(role="user", content=text),),
        instructions="You run a thermal energy store. End your answer with the number of the action in brackets.",
    )


def _short(state: State) -> Conversation:
    """In the plant's units and steps of the factor, in words that the tiny base knows."""
    day, place = state.day, state.place
    text = (
        f"store {state.stored}\n"
        f"load {_numbers(day.loads[place:], 1)}\n"
        f"pay {_numbers(tuple(factor // SMALL_FACTOR_STEP for factor in day.factors[place:]), 1)}"
    )
    return Conversation(messages=(Message(role="user", content=text),))


def _reference(plant: Plant, state: State) -> dict[str, Any]:
    rules = {
        name: rule(plant, state.day, state.place, state.stored) for name, rule in RULES.items() if rule is not optimal
    }
    rewards = boltzmann(state.values, plant.tau)
    return {"q_values": state.values, "rewards": rewards, "rules": rules, "hour": plant.hours[state.place]}


def task(rng: random.Random, split: Split) -> dict[str, Any]:
    state = draw_state(rng, split, BUILDING, load_units=3, factor_step=1)
    return decision_task(_described(BUILDING, state), _reference(BUILDING, state))


def small_task(rng: random.Random, split: Split) -> dict[str, Any]:
    state = draw_state(rng, split, SMALL, load_units=1, factor_step=SMALL_FACTOR_STEP)
    return decision_task(_short(state), _reference(SMALL, state))


def small_conversation(rng: random.Random, split: Split) -> dict[str, Any]:
    return open_choice(rng, small_task(rng, split))
