"""Budgets and stages as they are written on the command line."""

import pytest

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.budgets import (
    budget_name,
    by_cost,
    in_order,
    parse_budgets,
    parse_name,
    parse_searches,
    search_name,
)
from metaembed_jax.late_interaction.groups import Budget

LARGEST = Budget(16, 64, 32)


def test_parse_budgets():
    budgets = parse_budgets("1:1,4:8, 16:64x8,16:64x32", LARGEST)
    assert budgets == (Budget(1, 1), Budget(4, 8), (16, 64, 8), (16, 64, 32))
    assert [budget.sizes for budget in budgets] == [(1, 1), (4, 8), (16, 64, 8), (16, 64, 32)]
    assert [budget_name(budget) for budget in budgets] == ["1:1", "4:8", "16:64x8", "16:64x32"] == list(map(str, budgets))
    assert f"{budgets[2]}" == "16:64x8" and budget_name((16, 64)) == "16:64"


def test_parse_searches():
    text = "1:1,1:1:1000>16:64,1:1x8:500>2:4:50>16:64x16"
    searches = parse_searches(text.replace(">", " > ", 1), LARGEST)
    numbers = [tuple(stage.sizes for stage in search) for search in searches]
    assert numbers == [((1, 1),), ((1, 1, 1000), (16, 64)), ((1, 1, 8, 500), (2, 4, 50), (16, 64, 16))]
    assert numbers == [parse_name(search_name(search)) for search in searches]
    assert ",".join(map(search_name, searches)) == text


def test_plain_budgets_come_first_by_cost_and_stages_as_they_are_given():
    searches = parse_searches("1:1:9>16:64,16:64,1:1:5>2:4,4:8,1:1", LARGEST)
    assert [search_name(search) for search in in_order(iter(searches), 32)] == ["1:1", "4:8", "16:64", "1:1:9>16:64", "1:1:5>2:4"]


def test_a_width_makes_a_budget_cheaper():
    budgets = [Budget(*sizes) for sizes in ((16, 64), (1, 1), (16, 64, 8), (8, 32), (16, 64, 32), (4, 4, 8))]
    assert [str(budget) for budget in by_cost(budgets, 32)] == ["1:1", "4:4x8", "16:64x8", "8:32", "16:64", "16:64x32"]


@pytest.mark.parametrize(
    "text",
    ["", "1", "1:", "1:1,", "1:1:1", "-1:2", "a:b", "1.5:2", "٣:٣", "9999999:1", "0:1", "1:0", "1:1,1:1", "17:1", "1:65"]
    + ["1:1>2:4", "1:1:0>2:4", "1:1:5>2:4:5", "1:65:5>2:4", "1:1:5>17:4", "1:1:5>", ">1:1", "1:1:5>2:4,1:1:5>2:4"]
    + ["16:64x", "16:64x0", "16:64x33", "x8", "16:64x8:5", "16:64:5x8>1:1", "16x8:64", "1:1x33:5>2:4", "1:1x8,1:1x8"],
)
def test_refused(text):
    with pytest.raises(UserError) as caught:
        parse_searches(text, LARGEST)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--budgets={text}: ")


def test_stages_are_no_budget():
    with pytest.raises(UserError, match="1:1:5>2:4 has stages"):
        parse_budgets("1:1,1:1:5>2:4", LARGEST)
