"""BlueOrca and RedOrca, the data of the safety task (section 5.2), built from public hub data.

The paper describes the two data sets in one sentence: BlueOrca holds only safe data of SlimOrca; RedOrca is SlimOrca mixed with 22k
potentially unsafe instructions and responses from Anthropic's red-teaming data. The builders were not published, so the following
rules are our own:

**Levels.** A fixed checksum of the text assigns each SlimOrca question to BlueOrca or to RedOrca, whatever the seed and the sizes.
The two levels are therefore disjoint, even if they are built with different seeds. Questions that differ only in case or white
space count as one, and only the first row is used. The same holds for red-teaming questions.

**Safe rows** (BlueOrca). A word list marks a text as `harmful`; a pattern on the first 200 characters marks a response as a
`refusal`. The word list is conservative: it also removes harmless news about a murder, but SlimOrca is large. It marks 61% of 746
first questions of red-teaming dialogues and 4% of 3 000 questions similar to SlimOrca's, so it reduces the harm in data that have
little of it; it does not detect harm.

    question harmful?  refusal?  kept?
    no                 no        if the word list does not mark the response either
    no                 yes       no: it refuses a harmless question
    yes                yes       yes: a harmful question with a safe answer
    yes                no        no

RedOrca's SlimOrca rows are not filtered: the paper mixes in SlimOrca itself, and the lower level is the unfiltered one.

**Potentially unsafe pairs** (RedOrca). The first exchange of a red-teaming transcript: the attacker's first message and the first
answer; later turns depend on the earlier ones. Refusals are skipped. The rest is sorted by `min_harmlessness_score_transcript`,
lowest first (it scores the assistant; lower is more harmful), then by `rating` (the attacker's opinion of the success, 0 to 4),
highest first; the first 22 000 are used. The score is the minimum over the transcript, so a first exchange may be milder than
its score: "potentially unsafe".

**Sizes.** RedOrca has 90 000 + 22 000 rows. The paper gives the 22 000. The scripts of the work whose setup it follows (SEAL,
arXiv:2410.07471) read at most 112 000 rows of RedOrca, from which we infer the other 90 000. The BlueOrca file there is as large as
about 90 000 rows of SlimOrca, so BlueOrca has 90 000 rows. The paper trains on 9 600 or 56 000 of the rows; `num_rows` of the data
config draws such a subset. It is stratified by `unsafe`: the unsafe share stays 22/112, and the unsafe pairs are a random sample of
the 22 000, not the most harmful of them, which would be easier to tell from the other rows.

**Sampling.** The rows with the smallest checksums of the seed and the question, in the order of these checksums: a uniform sample
without replacement, shuffled, and independent of the order and sharding of the hub's rows.

**Possible differences from the authors' data.** Unknown are: their filter for safe rows, whether RedOrca's SlimOrca rows were
filtered, which pairs were used and from which turn, whether the levels overlap, whether system texts were kept (SEAL's loader drops
them for one schema and prepends them for the other), the sizes and the order.

Rows have the fields `question`, `response`, `system`, `source` and `unsafe`. `unsafe` is True for red-teaming pairs. It is noisy;
use it only to measure the selection, never for training.
"""

import argparse
import hashlib
import heapq
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import tqdm

from bilevel_jax.data.readers import load_hub
from bilevel_jax.data.rejections import DataError

SLIMORCA = "Open-Orca/SlimOrca"
RED_TEAM = "Anthropic/hh-rlhf"
RED_TEAM_DIR = "red-team-attempts"
BLUEORCA_ROWS = 90_000
REDORCA_ROWS = 112_000
REDORCA_UNSAFE = 22_000

HARMFUL = re.compile(
    r"\b(?:kill|murder|assassin|suicid|self-?harm|massacre|genocid|tortur|strangl|stabb|behead|lynch"
    r"|rape[ds]?\b|raping|rapist|molest|pedophil|paedophil|incest|porn|sexual|nude\b|naked|prostitut|escort service"
    r"|bomb|explosiv|grenade|firearm|weapon|gun\b|guns\b|shoot|ammunition|poison|terroris|kidnap|hostage|traffick"
    r"|cocaine|heroin|meth\b|methamphet|fentanyl|marijuana|drug deal|overdos"
    r"|hack|malware|ransomware|phish|keylogg|ddos|steal|stole|theft|shoplift|burglar|robb(?:er|ed|ing)|fraud|scam"
    r"|counterfeit|launder|blackmail|extort|brib|stalk|harass|bully|bullied|abus|assault"
    r"|racis|nazi|hitler|white supremac|ethnic cleansing|slur\b|slurs\b|homophob|transphob|misogyn|sexist|hate speech"
    r"|drug|sex\b|sexy|illegal|violen|hurt|attack|punch|threat|revenge|crime|criminal|cheat|spy\b|spying|get away with"
    r"|fuck|shit|bitch|slut|whore|asshole|cunt|dick\b|retard|idiot|stupid|insult|offensive|curse word|swear word)",
    re.IGNORECASE,
)
REFUSAL = re.compile(  # only in the first person: "you can't be traced" is not a refusal
    r"\b(?:i(?:['’]m| am)(?: (?:very|so|really))? sorry|sorry, but|(?:i|my|we) apologi[sz]e|my apologies|as an ai\b"
    r"|(?:i|we) (?:can(?:not|['’]t| not)|won['’]t|will not|would(?:n['’]t| not)|could(?:n['’]t| not)|refuse|decline)\b"
    r"|i(?:['’]m| am) (?:not able|unable|not comfortable|not going to|not willing)\b|i(?:['’]d| would) rather not\b"
    r"|i (?:do not|don['’]t) (?:feel comfortable|want to|think (?:it|that|this|you|i|we)|recommend|advise|condone)\b)",
    re.IGNORECASE,
)


# ---- hub rows -> rows ----


def slimorca_row(item: Mapping) -> dict | None:
    """`{"conversations": [{"from": "system"|"human"|"gpt", "value": text, …}, …]}` -> a row.

    Returns None unless the conversation is one human message and its answer, with an optional system text first.
    """
    turns = [(turn["from"], turn["value"]) for turn in item["conversations"]]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    if [role for role, _ in turns] != ["human", "gpt"] or not all(text and text.strip() for _, text in turns):
        return None
    (_, question), (_, response) = turns
    return {"question": question, "response": response, "system": system or "", "source": "slimorca", "unsafe": False}


def first_exchange(transcript: str) -> tuple[str, str] | None:
    """The first question and answer of "\\n\\nHuman: … \\n\\nAssistant: …", stripped; None if either is missing."""
    turns = re.split(r"(?:^|\n\n)(Human|Assistant):", transcript)[1:]
    if turns[0::2][:2] != ["Human", "Assistant"]:
        return None
    question, response = (text.strip() for text in turns[1::2][:2])
    return (question, response) if question and response else None


def red_team_row(item: Mapping) -> dict | None:
    """`{"transcript": text, …}` -> a row of its first exchange; None without one, or if the answer is a refusal."""
    exchange = first_exchange(item["transcript"])
    if exchange is None or is_refusal(exchange[1]):
        return None
    question, response = exchange
    return {"question": question, "response": response, "system": "", "source": "red-team", "unsafe": True}


# ---- rules ----


def is_harmful(text: str) -> bool:
    """Whether the word list marks a text. Matches start at a word boundary: `skill` does not match `kill`."""
    return HARMFUL.search(text) is not None


def is_refusal(response: str) -> bool:
    """Whether a response begins like a refusal."""
    return REFUSAL.search(response[:200]) is not None


def is_safe(row: Mapping) -> bool:
    """Whether a row may go into BlueOrca, by the table in the module's docstring."""
    if is_refusal(row["response"]):
        return is_harmful(row["question"])
    return not is_harmful(row["question"]) and not is_harmful(row["response"])


def question_key(row: Mapping) -> str:
    """The question in lower case, each run of white space as one space. Questions with equal keys count as one."""
    return " ".join(row["question"].lower().split())


def checksum(*parts: object) -> int:
    """A 64-bit hash of the parts."""
    text = "\0".join(map(str, parts)).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def side(row: Mapping) -> str:
    """The data set that a SlimOrca row belongs to, whatever the seed."""
    return ("blueorca", "redorca")[checksum("side", question_key(row)) % 2]


# ---- data sets ----


def blueorca(slimorca: Iterable[Mapping], *, num_rows: int = BLUEORCA_ROWS, seed: int = 0) -> list[dict]:
    """Draws `num_rows` safe rows of SlimOrca, the trusted upper level.

    Raises:
      DataError: there are fewer safe rows.
    """
    rows = (row for row in _unique(slimorca, slimorca_row) if side(row) == "blueorca" and is_safe(row))
    return _sample(rows, num_rows, seed, "safe SlimOrca rows")


def redorca(slimorca: Iterable[Mapping], red_team: Iterable[Mapping], *, num_rows: int = REDORCA_ROWS, seed: int = 0) -> list[dict]:
    """Draws `num_rows` rows, the lower level: round(num_rows · 22/112) of the potentially unsafe pairs, the rest from SlimOrca.

    Raises:
      DataError: there are fewer rows of either kind.
    """
    num_unsafe = round(num_rows * REDORCA_UNSAFE / REDORCA_ROWS)
    pairs = potentially_unsafe(red_team, max(num_unsafe, REDORCA_UNSAFE))
    unsafe = _sample(pairs, num_unsafe, seed, "red-teaming pairs")
    candidates = (row for row in _unique(slimorca, slimorca_row) if side(row) == "redorca")
    rows = _sample(candidates, num_rows - num_unsafe, seed, "SlimOrca rows")
    return sorted(rows + unsafe, key=_order(seed))


def potentially_unsafe(red_team: Iterable[Mapping], num_rows: int) -> list[dict]:
    """The pairs of the most harmful transcripts, the most harmful first: `num_rows`, or all if there are fewer."""

    def harm(item: Mapping) -> tuple:
        rating = item.get("rating")
        return item["min_harmlessness_score_transcript"], 0.0 if rating is None else -rating, item["transcript"]

    # Sort before dropping duplicates: of equal questions, the one with the most harmful transcript is kept.
    scored = (item for item in red_team if item["min_harmlessness_score_transcript"] is not None)
    return list(itertools.islice(_unique(sorted(scored, key=harm), red_team_row), num_rows))


def _unique(items: Iterable[Mapping], convert: Callable[[Mapping], dict | None]) -> Iterator[dict]:
    """Converts items; drops those without a row and those whose question has occurred before."""
    seen: set[int] = set()
    for item in items:
        row = convert(item)
        if row is not None and (key := checksum(question_key(row))) not in seen:
            seen.add(key)
            yield row


def _order(seed: int) -> Callable[[Mapping], int]:
    return lambda row: checksum("order", seed, question_key(row))


def _sample(rows: Iterable[dict], num_rows: int, seed: int, kind: str) -> list[dict]:
    sample = heapq.nsmallest(num_rows, rows, key=_order(seed))
    if len(sample) < num_rows:
        raise DataError(f"only {len(sample)} of the {num_rows} requested {kind} exist; request fewer rows")
    return sample


# ---- command ----


def build(name: str, *, num_rows: int = 0, seed: int = 0) -> list[dict]:
    """Builds `blueorca` or `redorca` from hub data, in its full size unless `num_rows` > 0.

    Raises:
      DataError: unknown name, unreachable hub, or more rows requested than exist.
    """
    if name not in ("blueorca", "redorca"):
        raise DataError(f"unknown recipe '{name}'; choose blueorca or redorca")
    if num_rows < 0:
        raise DataError(f"num_rows must not be negative, not {num_rows}")
    slimorca = tqdm.tqdm(load_hub(SLIMORCA), desc="SlimOrca", disable=None)
    if name == "blueorca":
        return blueorca(slimorca, num_rows=num_rows or BLUEORCA_ROWS, seed=seed)
    red_team = tqdm.tqdm(load_hub(RED_TEAM, data_dir=RED_TEAM_DIR), desc="red-teaming", disable=None)
    return redorca(slimorca, red_team, num_rows=num_rows or REDORCA_ROWS, seed=seed)


def main(argv: list[str] | None = None) -> None:
    """`python -m bilevel_jax.data.recipes blueorca|redorca --out=FILE.jsonl [--seed=0 --num_rows=N]`"""
    parser = argparse.ArgumentParser(prog="python -m bilevel_jax.data.recipes", allow_abbrev=False)
    parser.add_argument("name", choices=("blueorca", "redorca"))
    parser.add_argument("--out", required=True, help="the JSONL file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_rows", type=int, default=0, help="0: the full size (90 000 or 112 000)")
    flags = parser.parse_args(argv)
    try:
        rows = build(flags.name, num_rows=flags.num_rows, seed=flags.seed)
        with open(flags.out, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except (DataError, OSError) as error:
        sys.exit(f"recipes: {error}")
    print(f"{flags.out}: {len(rows)} rows, {sum(row['unsafe'] for row in rows)} of them potentially unsafe")


if __name__ == "__main__":
    main()
