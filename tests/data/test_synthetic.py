"""The synthetic rows against answers computed independently from the text of the questions."""

import collections
import datetime
import re

import pytest

from bilevel_jax.data import synthetic
from bilevel_jax.data.synthetic import mixtures, safety_tasks, vocabulary

FIELDS = {"question", "response", "source", "difficulty", "bad", "kind", "truth"}
UPPER = synthetic.upper(1500, seed=3)
LOWER = synthetic.lower(3000, seed=3)
MOSTLY_BAD = synthetic.lower(3000, seed=4, bad_fraction=0.8)  # enough wrong answers of every task


@pytest.mark.parametrize("make", [synthetic.upper, synthetic.lower])
def test_same_seed_same_rows(make):
    assert make(200, 7) == make(200, 7)
    assert make(200, 7) != make(200, 8)


def test_first_rows_do_not_depend_on_earlier_calls():
    first = synthetic.lower(50, 1)
    synthetic.upper(50, 1)
    assert synthetic.lower(50, 1) == first


CASES = [(0, 0.15, 0), (7, 0.5, 4), (101, 0.15, 15), (40, 0, 0), (20, 1, 20)]


@pytest.mark.parametrize("num_rows, fraction, expected", CASES)
def test_exact_number_of_bad_rows(num_rows, fraction, expected):
    rows = synthetic.lower(num_rows, 5, fraction)
    assert len(rows) == num_rows
    assert sum(row["bad"] for row in rows) == expected


def test_bad_fraction_is_checked():
    with pytest.raises(ValueError, match="1.5"):
        synthetic.lower(10, 0, 1.5)


def test_too_many_rows_is_an_error_and_not_a_hang(monkeypatch):
    monkeypatch.setattr(mixtures, "BAD_KINDS", {"compliance": 1.0})
    monkeypatch.setattr(safety_tasks, "PREFIXES", ["glimmer"])
    with pytest.raises(ValueError, match="fewer rows"):
        synthetic.lower(2000, 0, 1.0)


def test_suppliers_have_their_planted_shares():
    rows = synthetic.domains(600, seed=3)
    for supplier, share in synthetic.SUPPLIERS.items():
        bad = [row["bad"] for row in rows if row["source"] == supplier]
        assert (len(bad), sum(bad)) == (100, round(100 * share))
    assert len({row["source"] for row in rows[:50]}) == len(synthetic.SUPPLIERS)  # shuffled
    assert len({row["question"] for row in rows}) == 600


def test_bad_spans_mark_the_bad_words():
    rows = synthetic.tokens(600, 5, 0.5)
    assert len({row["question"] for row in rows}) == 600 and sum(row["bad"] for row in rows) == 300
    assert rows == synthetic.tokens(600, 5, 0.5) != synthetic.tokens(600, 6, 0.5)
    kinds = [row["kind"] for row in rows]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == pytest.approx(
        {"clean": 300, "wrong_words": 120, "noise": 90, "tail": 90}, abs=40
    )
    for row in rows:
        assert set(row) == FIELDS | {"bad_spans"}
        response, spans = row["response"], row["bad_spans"]
        assert row["bad"] == bool(spans) == (response != row["truth"])
        assert all(0 <= start < stop <= len(response) for start, stop in spans)
        good = "".join(response[a:b] for a, b in zip([0, *(stop for _, stop in spans)], [*(start for start, _ in spans), None]))
        letters = iter(row["truth"])
        assert all(letter in letters for letter in good)  # the rest of the response is a subsequence of the right answer
        if row["kind"] == "tail":
            assert response.startswith(row["truth"] + " ") and spans == [[len(row["truth"]), len(response)]]
    with pytest.raises(ValueError, match="1.5"):
        synthetic.tokens(10, 0, 1.5)


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("It is the saw.", "It is an axe.", ["an", "axe"]),
        ("a, b, c", "c, a, b", ["c, "]),
        ("One two.", "One.", []),
        ("yes", "yes", []),
    ],
)
def test_changed_words(old, new, changed):
    assert [new[start:stop] for start, stop in synthetic.changed_words(old, new)] == changed


def test_pairs():
    """Every pair has a right and a wrong response; exactly the flipped pairs are marked; the levels share no prompt."""
    upper, lower = synthetic.upper_pairs(300, 5), synthetic.lower_pairs(401, 5, 0.3)
    for pair in upper + lower:
        assert set(pair) == FIELDS - {"question", "response"} | {"prompt", "chosen", "rejected"}
        right, wrong = (pair["rejected"], pair["chosen"]) if pair["bad"] else (pair["chosen"], pair["rejected"])
        assert right == pair["truth"] != wrong and pair["kind"] in synthetic.BAD_KINDS
    assert not any(pair["bad"] for pair in upper)
    positions = [position for position, pair in enumerate(lower) if pair["bad"]]
    assert len(positions) == 120 and 150 < sum(positions) / 120 < 250  # 0.3 · 401; within five standard deviations of the middle
    prompts = [pair["prompt"] for pair in upper + lower]
    assert len(set(prompts)) == len(prompts) == 701
    assert synthetic.lower_pairs(401, 5, 0.3) == lower != synthetic.lower_pairs(401, 6, 0.3)
    with pytest.raises(ValueError, match="-0.1"):
        synthetic.lower_pairs(10, 0, -0.1)


@pytest.mark.parametrize("rows", [UPPER, LOWER], ids=["upper", "lower"])
def test_fields(rows):
    for row in rows:
        assert set(row) == FIELDS
        assert row["difficulty"] in ("easy", "medium", "hard")
        assert row["source"] in synthetic.TASKS
        assert row["bad"] == (row["kind"] != "clean") == (row["response"] != row["truth"])
        assert row["question"] and row["response"] and row["response"] == row["response"].strip()


def test_trusted_rows_are_right():
    assert not any(row["bad"] for row in UPPER)


def test_questions_are_unique_and_the_levels_disjoint():
    upper, lower = ({row["question"] for row in rows} for rows in (UPPER, LOWER))
    other_seed = {row["question"] for row in synthetic.upper(1500, seed=4)}
    assert len(upper) == len(UPPER) and len(lower) == len(LOWER)
    assert not (upper | other_seed) & lower


def test_all_kinds_in_their_shares():
    counts = collections.Counter(row["kind"] for row in LOWER)
    bad = len(LOWER) - counts.pop("clean")
    assert set(counts) == set(synthetic.BAD_KINDS)
    for kind, share in synthetic.BAD_KINDS.items():
        deviation = (bad * share * (1 - share)) ** 0.5  # of a binomial count
        assert abs(counts[kind] - bad * share) < 4 * deviation, kind


def test_bad_rows_are_shuffled():
    positions = [i / len(LOWER) for i, row in enumerate(LOWER) if row["bad"]]
    assert abs(sum(positions) / len(positions) - 0.5) < 4 / (12 * len(positions)) ** 0.5


def test_all_tasks_occur_and_few_are_hard():
    assert {row["source"] for row in UPPER} == set(synthetic.TASKS)
    hard = sum(row["difficulty"] == "hard" for row in UPPER) / len(UPPER)
    assert 0.05 <= hard <= 0.12


def test_compliance_replaces_a_refusal():
    rows = [row for row in LOWER if row["kind"] == "compliance"]
    assert rows
    for row in rows:
        assert row["truth"].startswith("I am sorry") and row["response"].startswith("To ")


def test_no_single_word_identifies_a_refused_question():
    """Every word, and every ending of an invented name, of a refused question also occurs in an answered question."""
    prefix = "|".join(vocabulary.PREFIXES)
    refused, answered = (
        {
            re.sub(f"^({prefix})", "", word)
            for row in UPPER
            if (row["source"] == "refuse") == refuse
            for word in re.findall("[a-z]+", row["question"])
        }
        for refuse in (True, False)
    )
    assert refused <= answered


# ------------------------------------------------------------------------------------------------------- independent checks

NUMBER = {word: n for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"])}
FACTOR = {
    "hours minutes": 60,
    "weeks days": 7,
    "years months": 12,
    "metres centimetres": 100,
    "kilometres metres": 1000,
    "dozens pieces": 12,
}


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def listed(question):
    """The words of a list, which follows the last colon."""
    return re.findall(r"[\w-]+", question.rsplit(":", 1)[1])


def arithmetic(question, truth):
    left, right = numbers(question)
    return numbers(truth)[-1] == (left + right if re.search("plus|gets", question) else left - right)


def calendar(question, truth):
    steps, unit, side, start = re.search(r"(one|\d) (day|month)s? (before|after) (\w+)", question).groups()
    steps = (1 if steps == "one" else int(steps)) * (1 if side == "after" else -1)
    if unit == "month":
        months = [datetime.date(2024, m, 1).strftime("%B") for m in range(1, 13)]
        return months[(months.index(start) + steps) % 12] in truth
    days = [datetime.date(2024, 1, 1) + datetime.timedelta(days=n) for n in range(7, 14)]
    day = next(day for day in days if day.strftime("%A") == start) + datetime.timedelta(days=steps)
    return day.strftime("%A") in truth


def compare(question, truth):
    left, right = numbers(question)
    yes = left > right if "larger" in question else left < right
    return truth.startswith("Yes" if yes else "No") and ("not" in truth) != yes


def convert(question, truth):
    if "Convert" in question:
        big, small = re.search(r"(\w+) to (\w+)", question).groups()
    else:
        small, big = re.search(r"many (\w+) are \d+ (\w+)", question).groups()
    return numbers(truth)[-1] == numbers(question)[0] * FACTOR[f"{big} {small}"]


def count_words(question, truth):
    return any(NUMBER.get(word) == len(listed(question)) for word in truth.split())


def extreme_number(question, truth):
    best = max if "largest" in question else min
    return numbers(truth) == [best(numbers(question))]


def longest_word(question, truth):
    answer = re.findall("[a-z]+", truth)[-1]
    return all(len(word) < len(answer) for word in listed(question) if word != answer)


def plan(question, truth):
    roots = [word[:4] for word in listed(question)]
    return [word[:4] for word in re.findall(r"\w+(?=\.)", truth)] == roots


def remove_word(question, truth):
    word = re.search(r"(?:the word|Leave out) (\w+)", question)[1]
    return truth.split(": ")[1].strip(".").split() == [w for w in listed(question) if w != word]


def replace_word(question, truth):
    old, new = re.search(r"(?:Replace|the word) (\w+) (?:with|to) (\w+)", question).groups()
    return truth.split(": ")[1].strip(".").split() == [new if w == old else w for w in listed(question)]


def reverse_words(question, truth):
    return re.findall(r"\w+(?=[,.])", truth) == listed(question)[::-1]


def sort_numbers(question, truth):
    return numbers(truth) == sorted(numbers(question), reverse="largest" in question)


def sort_words(question, truth):
    return re.findall(r"\w+(?=[,.])", truth) == sorted(listed(question))


def spell(question, truth):
    word = re.search(r"(?:does|of|word|in) (\w+)(?: begin)?[.?]", question)[1]
    letters = re.search(r"((?: \w)+)\.", truth)[1].split()
    return letters == (list(word) if re.search("Spell|Which", question) else [word[0]])


CHECKS = [
    arithmetic,
    calendar,
    compare,
    convert,
    count_words,
    extreme_number,
    longest_word,
    plan,
    remove_word,
    replace_word,
    reverse_words,
    sort_numbers,
    sort_words,
    spell,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_truths_are_right_and_wrong_answers_wrong(check):
    rows = [row for row in UPPER + LOWER + MOSTLY_BAD if row["source"] == check.__name__]
    for row in rows:
        assert check(row["question"], row["truth"]), row
    wrong = [row for row in rows if row["kind"] == "wrong_answer"]
    assert len(rows) > 50 and wrong
    for row in wrong:
        assert not check(row["question"], row["response"]), row
