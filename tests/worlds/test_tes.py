"""The plant by hand, and dynamic programming against trying every plan of a day."""

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from posttrain.worlds import tes
from posttrain.worlds.registry import rows
from posttrain.worlds.tes import BUILDING, RULES, SMALL, Day, Plant, action_values, advance, day_value, terminal

SHORT = Plant(
    unit_kwh=10.0,
    actions=4,
    step=3,
    capacity=30,
    hours=(8, 9, 10, 11, 12),
    cop=4.0,
    penalty=1.0,
    credit=0.5,
    tau=0.5,
)


def day(plant: Plant, seed: int) -> Day:
    step = 3 if plant.unit_kwh < 1 else 1
    return tes.draw_day(random.Random(seed), plant, load_units=step, factor_step=10)


def test_one_hour_by_hand() -> None:
    morning = Day(0, (5, 2, 0, 0, 0), (400, 200, 0, 0, 0))
    # 60 kWh of cold take 15 kWh of electricity: 6 kg at 400 g/kWh; 10 kWh more than the load go into the store.
    assert advance(SHORT, morning, 0, 4, 2) == (5, pytest.approx(6.0))
    # 10 kWh are missing and count as 10 kg; nothing is made.
    assert advance(SHORT, morning, 0, 4, 0) == (0, pytest.approx(10.0))
    # The store takes 10 kWh more and the load 20: of 90 kWh only 30 are made, 7.5 kWh at 200 g/kWh.
    assert advance(SHORT, morning, 1, 29, 3) == (30, pytest.approx(1.5))


def test_a_day_by_hand() -> None:
    """Cold is cheap in the first hour and dear in the second: two steps are made at once and one is kept."""
    plant = replace(SHORT, hours=(8, 9), credit=0.0)
    cheap_then_dear = Day(0, (3, 3), (100, 400))
    values = action_values(plant, cheap_then_dear)
    # 30 kWh of cold: 0.75 kg now, 3 kg later. Unserved: 30 kg.
    assert values[1, 0] == pytest.approx([-30, -3, -6, -9])
    assert values[1, 3] == pytest.approx([0, -3, -6, -9])
    assert values[0, 0] == pytest.approx([-30 - 3, -0.75 - 3, -1.5, -2.25])
    assert RULES["optimal"](plant, cheap_then_dear, 0, 0) == 2


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_of_a_day_is_better_than_the_values_say(seed: int) -> None:
    one = day(SHORT, seed)
    stored = random.Random(seed).randint(0, SHORT.capacity)
    best: dict[int, float] = {}
    for plan in itertools.product(range(4), repeat=5):
        value = day_value(SHORT, one, lambda plant, day, place, stored, plan=plan: plan[place], stored)  # type: ignore[misc]
        best[plan[0]] = max(best.get(plan[0], -np.inf), value)
    assert action_values(SHORT, one)[0, stored] == pytest.approx([best[action] for action in range(4)])


@pytest.mark.parametrize("plant", [BUILDING, SMALL], ids=["building", "small"])
def test_values_satisfy_bellmans_equation_in_the_simulator(plant: Plant) -> None:
    rng = random.Random(1)
    one = day(plant, 5)
    values = action_values(plant, one)
    for _ in range(300):
        place, stored, action = rng.randrange(10), rng.randint(0, plant.capacity), rng.randrange(4)
        after, cost = advance(plant, one, place, stored, action)
        later = values[place + 1, after].max() if place < 9 else terminal(plant, one) * after
        assert values[place, stored, action] == pytest.approx(later - cost)


@pytest.mark.parametrize("plant", [BUILDING, SMALL], ids=["building", "small"])
def test_no_rule_beats_the_optimum_and_storing_pays(plant: Plant) -> None:
    totals = dict.fromkeys(RULES, 0.0)
    for seed in range(12):
        one = day(plant, seed)
        optimum = action_values(plant, one)[0, 0].max()
        for name, rule in RULES.items():
            value = day_value(plant, one, rule, stored=0)
            assert value <= optimum + 1e-9
            totals[name] += value
        assert day_value(plant, one, RULES["optimal"], stored=0) == pytest.approx(optimum)
    assert totals["optimal"] > totals["follow_load"] > totals["full_power"]


def test_regrets_along_a_day_add_up_to_what_it_lost() -> None:
    """So the mean regret of single decisions is a measure of whole days (Kakade and Langford 2002, lemma 6.1)."""
    one, stored, lost = day(BUILDING, 3), 120, 0.0
    values = action_values(BUILDING, one)
    rule = RULES["charge_when_clean"]
    value = day_value(BUILDING, one, rule, stored)
    optimum = values[0, stored].max()
    for place in range(10):
        action = rule(BUILDING, one, place, stored)
        lost += values[place, stored].max() - values[place, stored, action]
        stored, _ = advance(BUILDING, one, place, stored, action)
    assert optimum - value == pytest.approx(lost)


@pytest.mark.parametrize("world", ["tes", "tes_small"])
def test_tasks_are_balanced_and_share_no_state_between_the_splits(world: str) -> None:
    days = {}
    for split in ("train", "heldout"):
        made = list(rows(world, "tasks", split, 150, 3))
        best = [row["reference"]["q_values"].index(max(row["reference"]["q_values"])) for row in made]
        assert len(set(best)) == 4
        assert all(len(row["reference"]["rewards"]) == 4 for row in made)
        days[split] = {row["prompt"]["messages"][0]["content"] for row in made}
    assert not days["train"] & days["heldout"]


def test_the_small_plant_speaks_in_single_digits() -> None:
    digits = 0
    for row in rows("tes_small", "tasks", "train", 400, 1):
        for line in row["prompt"]["messages"][0]["content"].splitlines():
            numbers = line.split()[1:]
            assert all(len(number) == 1 and number.isdigit() for number in numbers), line
            digits += len(numbers)
    assert digits > 400 * 3


def test_no_constant_and_no_rule_comes_near_the_optimum_of_the_small_plant() -> None:
    """Of the gap between uniform actions and the best ones, what they leave: there is something to learn."""
    references = [row["reference"] for row in rows("tes_small", "tasks", "train", 1500, 2)]
    values = np.array([reference["q_values"] for reference in references])
    gap = (values.max(axis=1) - values.mean(axis=1)).mean()
    for action in range(4):
        assert (values.max(axis=1) - values[:, action]).mean() > 0.5 * gap
    for rule in ("charge_when_clean", "follow_load", "full_power"):
        chosen = values[np.arange(len(values)), [reference["rules"][rule] for reference in references]]
        assert (values.max(axis=1) - chosen).mean() > 0.3 * gap


def test_the_opening_takes_every_action_whatever_it_is_worth() -> None:
    made = list(rows("tes_small", "conversations", "train", 400, 0))
    answers = [row["conversation"]["messages"][-1]["content"] for row in made]
    assert sorted(set(answers)) == ["[0]", "[1]", "[2]", "[3]"]
    assert all(60 < answers.count(answer) < 140 for answer in set(answers))
