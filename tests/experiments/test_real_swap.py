"""The rows of the swap test on real rows, on a few rows in their form."""

import json

import pytest

from bilevel_jax.errors import RunError
from experiments.selection import candidates, real_swap

SIZES = 4, 3, 6  # ordinary, refused and complied, trusted
SOURCES = {  # source, unsafe, tier: kind
    ("dolly/open_qa", False, ""): "ordinary",
    ("safeinstr/safe_answer", False, ""): "refused",
    ("hh_rlhf/harmless_base_rejected", True, "A"): "complied",
    ("beavertails/is_safe_false", True, "H"): "complied",
    ("hh_rlhf/harmless_base_rejected", True, "B"): None,  # its label is not certain
}


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "safety").mkdir()
    for name in ("upper_safe", "lower_mixed"):
        lines = [
            {"question": f"{name} {i} {source}", "response": "Yes.", "source": source, "unsafe": unsafe, "unsafe_tier": tier}
            for source, unsafe, tier in SOURCES
            for i in range(8)
        ]
        lines.append(lines[0] | {"response": "x" * 1000})  # too long
        (tmp_path / "safety" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return real_swap.read_rows(tmp_path)


def test_rows_by_kind(rows):
    assert {kind: len(of_kind) for kind, of_kind in rows.items()} == {"ordinary": 16, "refused": 16, "complied": 32}
    assert all("unsafe" not in row and "source" not in row for of_kind in rows.values() for row in of_kind)


def test_only_the_trusted_rows_change(rows):
    (upper_a, lower_a), (upper_b, lower_b) = (real_swap.make_rows(rows, swap, 5, SIZES) for swap in "AB")
    assert lower_a == lower_b and len(lower_a) == 4 + 2 * 3
    assert sorted(row["kind"] for row in upper_a) == ["ordinary"] * 3 + ["refused"] * 3
    assert sorted(row["kind"] for row in upper_b) == ["complied"] * 3 + ["ordinary"] * 3
    questions = [row["question"] for row in lower_a]
    assert not {row["question"] for row in upper_a + upper_b} & set(questions) and len(set(questions)) == len(questions)


def test_too_few_rows(rows):
    with pytest.raises(RunError, match="40 refused rows are wanted, and there are 16 short ones"):
        real_swap.make_rows(rows, "A", 0, (4, 37, 6))


def test_a_page_with_rules_of_fewer_seeds_than_similar():
    real_swap.FLAGS(["real_swap"])
    numbers = {"weight": {"like": 0.9, "all": 0.7, "mean": 1.1}, "plausible": {"like": 0.8, "all": 0.6}}
    similar = {"similar": {"like": 0.99, "all": 0.95}}
    of_rules = {(candidates.OURS, swap): numbers | {"useful": {"like": 0.85, "all": 0.65}} for swap in "AB"} | {
        (candidates.LOSS, swap): numbers for swap in "AB"
    }
    untrained = {(real_swap.UNTRAINED, swap): similar for swap in "AB"}
    lines = real_swap.page([of_rules | untrained, untrained])
    assert f"| {candidates.OURS} | useful | 1 | 0.8500 | 0.6500 |  | 0.8500 | 0.6500 |  |" in lines
    assert (
        f"| {real_swap.UNTRAINED} | similar | 2 | 0.9900 ± 0.0000 | 0.9500 ± 0.0000 |  | 0.9900 ± 0.0000 | 0.9500 ± 0.0000 |  |"
        in lines
    )
    assert not any(f"| {candidates.LOSS} | useful" in line for line in lines)
