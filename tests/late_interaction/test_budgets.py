"""Budgets and stages as they are written on the command line."""

import pytest

from metaembed_jax.errors import UserError
from metaembed_jax.late_interaction.budgets import in_order, parse_budgets, parse_searches, search_name

LARGEST = (16, 64)


def test_parse_budgets():
    assert parse_budgets("1:1,4:8, 16:64", LARGEST) == ((1, 1), (4, 8), (16, 64))


def test_parse_searches():
    text = "1:1,1:1:1000>16:64,1:1:500>2:4:50>16:64"
    searches = parse_searches(text.replace(">", " > ", 1), LARGEST)
    assert searches == (((1, 1),), ((1, 1, 1000), (16, 64)), ((1, 1, 500), (2, 4, 50), (16, 64)))
    assert ",".join(map(search_name, searches)) == text


def test_plain_budgets_come_first_by_cost_and_stages_as_they_are_given():
    searches = parse_searches("1:1:9>16:64,16:64,1:1:5>2:4,4:8,1:1", LARGEST)
    assert [search_name(search) for search in in_order(iter(searches))] == ["1:1", "4:8", "16:64", "1:1:9>16:64", "1:1:5>2:4"]


@pytest.mark.parametrize(
    "text",
    ["", "1", "1:", "1:1,", "1:1:1", "-1:2", "a:b", "1.5:2", "٣:٣", "9999999:1", "0:1", "1:0", "1:1,1:1", "17:1", "1:65"]
    + ["1:1>2:4", "1:1:0>2:4", "1:1:5>2:4:5", "1:65:5>2:4", "1:1:5>17:4", "1:1:5>", ">1:1", "1:1:5>2:4,1:1:5>2:4"],
)
def test_refused(text):
    with pytest.raises(UserError) as caught:
        parse_searches(text, LARGEST)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--budgets={text}: ")


def test_stages_are_no_budget():
    with pytest.raises(UserError, match="1:1:5>2:4 has stages"):
        parse_budgets("1:1,1:1:5>2:4", LARGEST)
