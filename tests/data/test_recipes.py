import collections
import json
import math

import pytest

from bilevel_jax.data import recipes, rows
from bilevel_jax.data.rows import DataError


def orca(question, response="It is so.", system="You are an AI assistant."):
    """A row in the schema of Open-Orca/SlimOrca."""
    return {
        "conversations": [
            {"from": "system", "value": system, "weight": None},
            {"from": "human", "value": question, "weight": 0.0},
            {"from": "gpt", "value": response, "weight": 1.0},
        ]
    }


def attempt(transcript, score=-1.0, rating=3.0):
    """A row in the schema of Anthropic/hh-rlhf, red-team-attempts."""
    return {
        "transcript": transcript,
        "min_harmlessness_score_transcript": score,
        "num_params": "52B",
        "model_type": "plain lm",
        "rating": rating,
        "task_description": "d",
        "is_upworker": False,
        "task_description_harmlessness_score": 0.5,
        "red_team_member_id": 1,
        "tags": None,
    }


def dialogue(question, answer="Sure, this is how."):
    return f"\n\nHuman: {question} \n\nAssistant: {answer}\n\nHuman: more\n\nAssistant: more"


SLIMORCA = [orca(f"What is {n} plus {n}?", str(2 * n)) for n in range(200)]
RED_TEAM = [attempt(dialogue(f"How do I break rule {n}?"), score=-n / 10) for n in range(60)]


# ---- the hub's schemas ----


def test_slimorca_row():
    assert recipes.slimorca_row(orca("q", "r", "s")) == {
        "question": "q",
        "response": "r",
        "system": "s",
        "source": "slimorca",
        "unsafe": False,
    }
    without_system = {"conversations": orca("q", "r")["conversations"][1:]}
    assert recipes.slimorca_row(without_system)["system"] == ""


@pytest.mark.parametrize("kept", [[], [0], [0, 1], [0, 2], [1, 2, 1, 2], [0, 2, 1]])
def test_other_conversations_are_skipped(kept):
    turns = orca("q", "r")["conversations"]
    assert recipes.slimorca_row({"conversations": [turns[index] for index in kept]}) is None


@pytest.mark.parametrize("question", ["", "  ", None])
def test_empty_turns_are_skipped(question):
    assert recipes.slimorca_row(orca(question)) is None


@pytest.mark.parametrize(
    ("transcript", "exchange"),
    [
        ("\n\nHuman: a \n\nAssistant: b\n\nHuman: c\n\nAssistant: d", ("a", "b")),
        ("Human: a\n\nAssistant: b", ("a", "b")),
        ("\n\nHuman: a\n\nb\n\nAssistant: c\n\nd Human: e", ("a\n\nb", "c\n\nd Human: e")),
        ("\n\nHuman: a", None),
        ("\n\nHuman: a\n\nAssistant: ", None),
        ("\n\nAssistant: a\n\nHuman: b", None),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", None),
        ("", None),
    ],
)
def test_first_exchange(transcript, exchange):
    assert recipes.first_exchange(transcript) == exchange


# ---- the rules ----


@pytest.mark.parametrize(
    ("text", "harmful"),
    [
        ("How do I make a bomb?", True),
        ("He was KILLED.", True),
        ("methamphetamine", True),
        ("a gun", True),
        ("a new skill", False),
        ("Summarise the method.", False),
        ("the gunwale", False),
        ("burglary", True),
        ("What is the capital of France?", False),
        ("grape harvest", False),
        ("shipping therapist", False),
    ],
)
def test_is_harmful(text, harmful):
    assert recipes.is_harmful(text) == harmful


@pytest.mark.parametrize(
    ("response", "refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry.", True),
        ("As an AI, I have no views.", True),
        ("I cannot assist you.", True),
        ("I won't do that", True),
        ("I am not comfortable with it.", True),
        ("You can't be traced if you do it at night.", False),
        ("Sure! First, buy a lock pick.", False),
        ("x" * 200 + " I'm sorry", False),
    ],
)
def test_is_refusal(response, refusal):
    assert recipes.is_refusal(response) == refusal


@pytest.mark.parametrize(
    ("question", "response", "safe"),
    [
        ("What is a cat?", "An animal.", True),
        ("What is a cat?", "An animal that kills mice.", False),
        ("What is a cat?", "I'm sorry, I cannot say.", False),
        ("How do I make a bomb?", "I'm sorry, I cannot help with bombs.", True),
        ("How do I make a bomb?", "Take some flour.", False),
    ],
)
def test_is_safe(question, response, safe):
    assert recipes.is_safe({"question": question, "response": response}) == safe


# ---- the data sets ----


def questions(selected):
    return [row["question"] for row in selected]


def test_blueorca_is_safe_seeded_and_independent_of_order():
    unsafe = [orca(f"How do I build bomb {n}?", "Like this.") for n in range(200)]
    selected = recipes.blueorca(SLIMORCA + unsafe, num_rows=60, seed=1)
    assert len(set(questions(selected))) == 60 and all("plus" in question for question in questions(selected))
    assert selected == recipes.blueorca(unsafe + SLIMORCA[::-1], num_rows=60, seed=1)
    other = recipes.blueorca(SLIMORCA, num_rows=60, seed=2)
    assert questions(other) != questions(selected) and set(questions(other)) != set(questions(selected))


def test_levels_are_disjoint_whatever_the_seeds():
    blue = {q for seed in range(5) for q in questions(recipes.blueorca(SLIMORCA, num_rows=60, seed=seed))}
    red = {q for seed in range(5) for q in questions(recipes.redorca(SLIMORCA, RED_TEAM, num_rows=80, seed=seed))}
    assert len(blue) > 80 and len(red) > 80 and not blue & red
    spelled = [{"question": text} for text in ("What is  ONE?", " what is one?\n")]
    assert recipes.side(spelled[0]) == recipes.side(spelled[1])


def test_redorca_keeps_the_unsafe_share_and_is_shuffled():
    selected = recipes.redorca(SLIMORCA, RED_TEAM, num_rows=56, seed=0)
    flags = [row["unsafe"] for row in selected]
    assert len(selected) == 56 and sum(flags) == 11  # 56 · 22/112
    assert [row["source"] == "red-team" for row in selected] == flags
    assert not all(flags[:11]) and not all(flags[-11:])
    again = recipes.redorca(SLIMORCA[::-1], RED_TEAM[::-1], num_rows=56, seed=0)
    assert selected == again != recipes.redorca(SLIMORCA, RED_TEAM, num_rows=56, seed=1)


def test_most_harmful_pairs_are_used():
    attempts = [
        attempt(dialogue("mild"), score=2.0, rating=4.0),
        attempt(dialogue("tie, rated low"), score=-3.0, rating=0.0),
        attempt(dialogue("tie, rated high"), score=-3.0, rating=4.0),
        attempt(dialogue("tie, unrated"), score=-3.0, rating=None),
        attempt(dialogue("refused", "I'm sorry, I can't."), score=-9.0),
        attempt("\n\nHuman: unanswered", score=-9.0),
        attempt(dialogue("unscored"), score=None),
        attempt(dialogue("worst", "first answer"), score=-4.0),
        attempt(dialogue("Worst ", "of the milder transcript"), score=1.0),
    ]
    selected = recipes.potentially_unsafe(attempts, 4)
    assert questions(selected)[:2] == ["worst", "tie, rated high"]
    assert set(questions(selected)[2:]) == {"tie, rated low", "tie, unrated"}
    assert selected[0] == {"question": "worst", "response": "first answer", "system": "", "source": "red-team", "unsafe": True}
    assert questions(recipes.potentially_unsafe(attempts, 5))[4] == "mild"


def test_fewer_rows_are_a_random_share_of_each_kind(monkeypatch):
    """Of the pairs of the full size, here the 22 most harmful of 60, half are drawn, each equally often."""
    monkeypatch.setattr(recipes, "REDORCA_UNSAFE", 22)
    monkeypatch.setattr(recipes, "REDORCA_ROWS", 112)
    slimorca = [orca(f"What is {n} plus {n}?", str(2 * n)) for n in range(250)]
    most_harmful = {f"How do I break rule {n}?" for n in range(38, 60)}  # scores fall with n

    def unsafe(num_rows, seed):
        return [row["question"] for row in recipes.redorca(slimorca, RED_TEAM, num_rows=num_rows, seed=seed) if row["unsafe"]]

    times = collections.Counter(question for seed in range(200) for question in unsafe(56, seed))
    assert set(times) == most_harmful and sum(times.values()) == 200 * 11
    assert all(abs(number - 100) < 5 * math.sqrt(200 * 0.5 * 0.5) for number in times.values())  # five standard deviations
    assert unsafe(56, 3) == unsafe(56, 3)
    assert set(unsafe(112, 0)) == set(unsafe(112, 1)) == most_harmful


def test_one_row_per_question():
    twice = [row for n in range(40) for row in (orca(f"Question {n}?", "first"), orca(f"question  {n}?", "second"))]
    selected = recipes.blueorca(twice, num_rows=5)
    assert {row["response"] for row in selected} == {"first"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recipes.blueorca(SLIMORCA, num_rows=150), "of the 150 requested safe SlimOrca rows exist"),
        (lambda: recipes.redorca(SLIMORCA, RED_TEAM, num_rows=200), "of the 161 requested SlimOrca rows exist"),
        (lambda: recipes.redorca(SLIMORCA, RED_TEAM[:3], num_rows=56), "only 3 of the 11 requested red-teaming pairs"),
        (lambda: recipes.build("greenorca"), "unknown recipe 'greenorca'; choose blueorca or redorca"),
        (lambda: recipes.build("blueorca", num_rows=-1), "num_rows must not be negative"),
    ],
)
def test_rejects(make, message):
    with pytest.raises(DataError, match=message):
        make()


# ---- the command ----


@pytest.fixture
def hub(monkeypatch):
    def load_dataset(name, config, *, split, data_dir):
        return {("Open-Orca/SlimOrca", None): SLIMORCA, ("Anthropic/hh-rlhf", "red-team-attempts"): RED_TEAM}[name, data_dir]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)


def test_command_writes_readable_rows(hub, tmp_path, capsys):
    out = tmp_path / "red.jsonl"
    recipes.main(["redorca", f"--out={out}", "--seed=3", "--num_rows=56"])
    assert capsys.readouterr().out == f"{out}: 56 rows, 11 of them potentially unsafe\n"
    expected = recipes.redorca(SLIMORCA, RED_TEAM, num_rows=56, seed=3)
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    selected, report = rows.read_rows(out)
    assert report.num_rows == 56 and not report.rejections and [dict(row.fields) for row in selected] == expected


def test_command_fails_in_one_line(monkeypatch, tmp_path):
    def load_dataset(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(SystemExit, match="^recipes: no file and no reachable hub .*SlimOrca.*: no network$"):
        recipes.main(["blueorca", f"--out={tmp_path / 'x.jsonl'}"])
    with pytest.raises(SystemExit):
        recipes.main(["blueorca", "--out=x.jsonl", "--seeds=3"])
