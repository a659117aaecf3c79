"""BlueOrca and RedOrca, the data of the safety task (section 5.2), built from public hub data.

The paper describes them in one sentence: BlueOrca holds safe data of SlimOrca only, and RedOrca is SlimOrca mixed
with 22k potentially unsafe instructions and responses picked from Anthropic's red-teaming data. Neither builder was
published. What follows is ours, and every choice is stated:

**Sides.** Each SlimOrca question belongs to BlueOrca or to RedOrca by a fixed checksum of its text, whatever the seed
and the sizes. So the two levels are disjoint even if they are built apart, with different seeds. Questions that
differ in case or spacing alone count as one, of which the first row is used; so it is for red-teaming questions.

**Safe rows** (BlueOrca). A word screen marks a text as `harmful`, a pattern on the first 200 characters marks a
response as a `refusal`. Conservative on purpose: harmless news about a murder goes too, there is plenty of SlimOrca.
(The screen marks 61% of 746 first questions of red-teaming dialogues, and 4% of 3 000 questions like SlimOrca's. So it
thins out harm in data that have little of it; it is no detector of harm.)

    question harmful?  refusal?  kept?
    no                 no        if the screen does not mark the response either
    no                 yes       no: it refuses a question that nothing is wrong with
    yes                yes       yes: a harmful question and a safe answer
    yes                no        no

RedOrca's SlimOrca rows are not screened: the paper speaks of SlimOrca there, and the lower level is the unfiltered one.

**Potentially unsafe pairs** (RedOrca). The first exchange of a red-teaming transcript: the attacker's first message
and the first answer. Later turns make no sense without the earlier ones. Refusals are left out. The rest is ranked by
`min_harmlessness_score_transcript`, the lowest first (it scores the assistant: lower is more harmful), ties by
`rating` (the attacker's opinion of the success, 0 to 4), the highest first, and cut off at the number wanted. The
score is the minimum over the transcript, so a first exchange may be milder than its score: "potentially unsafe"
indeed.

**Sizes.** RedOrca has 90 000 + 22 000 rows. The paper gives the 22 000; the scripts of the work whose setup it
follows (SEAL, arXiv:2410.07471) read at most 112 000 rows of RedOrca, and the other 90 000 are inferred from that.
The BlueOrca file there is as large as about 90 000 rows of SlimOrca, so BlueOrca has 90 000 rows. Asking for fewer
keeps the unsafe share of 22/112. The paper trains on 9 600 or 56 000 of them: draw those with `num_rows` of the data
config.

**Sampling.** The rows whose checksums with the seed are the smallest, in the order of these checksums: a uniform
sample without replacement and a shuffle in one, independent of the order and sharding of the hub's rows.

**How the authors' data may differ.** Their screen for safe rows, whether RedOrca's SlimOrca rows were screened, which
pairs were picked and from which turn, whether the levels overlap, whether system texts were kept (SEAL's loader drops
them for one schema and prepends them for the other), sizes and order are all unknown.

Rows have the fields `question`, `response`, `system`, `source` and `unsafe`. The last is True for red-teaming pairs:
it is noisy, and for measuring the selection only, never for training.
"""

import argparse
import hashlib
import heapq
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import tqdm

from bilevel_jax.data.rows import DataError, hub

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
REFUSAL = re.compile(  # in the first person throughout: "you can't be traced" is none
    r"\b(?:i(?:['’]m| am)(?: (?:very|so|really))? sorry|sorry, but|(?:i|my|we) apologi[sz]e|my apologies|as an ai\b"
    r"|(?:i|we) (?:can(?:not|['’]t| not)|won['’]t|will not|would(?:n['’]t| not)|could(?:n['’]t| not)|refuse|decline)\b"
    r"|i(?:['’]m| am) (?:not able|unable|not comfortable|not going to|not willing)\b|i(?:['’]d| would) rather not\b"
    r"|i (?:do not|don['’]t) (?:feel comfortable|want to|think (?:it|that|this|you|i|we)|recommend|advise|condone)\b)",
    re.IGNORECASE,
)


# ---- rows of the hub -> our rows ----


def slimorca_row(item: Mapping) -> dict | None:
    """`{"conversations": [{"from": "system"|"human"|"gpt", "value": text, …}, …]}` -> a row.

    None unless the conversation is a human's message and its answer, with or without a system text before them.
    """
    turns = [(turn["from"], turn["value"]) for turn in item["conversations"]]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    if [role for role, _ in turns] != ["human", "gpt"] or not all(text and text.strip() for _, text in turns):
        return None
    (_, question), (_, response) = turns
    return {"question": question, "response": response, "system": system or "", "source": "slimorca", "unsafe": False}


def first_exchange(transcript: str) -> tuple[str, str] | None:
    """The first question and answer of "\\n\\nHuman: … \\n\\nAssistant: …", stripped; None unless both are there."""
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


# ---- the rules ----


def is_harmful(text: str) -> bool:
    """Whether the word screen marks a text. Words are matched from their beginning: `skill` is no `kill`."""
    return HARMFUL.search(text) is not None


def is_refusal(response: str) -> bool:
    """Whether a response opens like a refusal."""
    return REFUSAL.search(response[:200]) is not None


def is_safe(row: Mapping) -> bool:
    """The table above."""
    if is_refusal(row["response"]):
        return is_harmful(row["question"])
    return not is_harmful(row["question"]) and not is_harmful(row["response"])


def question_key(row: Mapping) -> str:
    """What makes two questions the same: the text in lower case, each run of white space as one space."""
    return " ".join(row["question"].lower().split())


def checksum(*parts: object) -> int:
    """64 uniform bits that depend on the parts alone."""
    text = "\0".join(map(str, parts)).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def side(row: Mapping) -> str:
    """Which data set a SlimOrca row may go to, whatever the seed."""
    return ("blueorca", "redorca")[checksum("side", question_key(row)) % 2]


# ---- the data sets ----


def blueorca(slimorca: Iterable[Mapping], *, num_rows: int = BLUEORCA_ROWS, seed: int = 0) -> list[dict]:
    """`num_rows` safe rows of SlimOrca, the trusted upper level.

    Raises:
      DataError: if there are not that many.
    """
    rows = (row for row in _unique(slimorca, slimorca_row) if side(row) == "blueorca" and is_safe(row))
    return _sample(rows, num_rows, seed, "safe SlimOrca rows")


def redorca(slimorca: Iterable[Mapping], red_team: Iterable[Mapping], *, num_rows: int = REDORCA_ROWS, seed: int = 0) -> list[dict]:
    """SlimOrca rows with round(num_rows · 22/112) potentially unsafe pairs among them, the lower level.

    Raises:
      DataError: if there are not that many of either.
    """
    num_unsafe = round(num_rows * REDORCA_UNSAFE / REDORCA_ROWS)
    unsafe = potentially_unsafe(red_team, num_unsafe)
    rows = (row for row in _unique(slimorca, slimorca_row) if side(row) == "redorca")
    rows = _sample(rows, num_rows - num_unsafe, seed, "SlimOrca rows")
    return sorted(rows + unsafe, key=_order(seed))


def potentially_unsafe(red_team: Iterable[Mapping], num_rows: int) -> list[dict]:
    """The pairs of the most harmful transcripts, the most harmful first.

    Raises:
      DataError: if there are not that many.
    """

    def harm(item: Mapping) -> tuple:
        rating = item.get("rating")
        return item["min_harmlessness_score_transcript"], 0.0 if rating is None else -rating, item["transcript"]

    # Ranked before duplicates are dropped: of equal questions, the one with the most harmful transcript stays.
    scored = (item for item in red_team if item["min_harmlessness_score_transcript"] is not None)
    rows = list(_unique(sorted(scored, key=harm), red_team_row))
    return _enough(rows[:num_rows], num_rows, "red-teaming pairs")


def _unique(items: Iterable[Mapping], convert: Callable[[Mapping], dict | None]) -> Iterator[dict]:
    """Converts items and drops those that have no row or a question seen before."""
    seen: set[int] = set()
    for item in items:
        row = convert(item)
        if row is not None and (key := checksum(question_key(row))) not in seen:
            seen.add(key)
            yield row


def _order(seed: int) -> Callable[[Mapping], int]:
    return lambda row: checksum("order", seed, question_key(row))


def _sample(rows: Iterable[dict], num_rows: int, seed: int, what: str) -> list[dict]:
    return _enough(heapq.nsmallest(num_rows, rows, key=_order(seed)), num_rows, what)


def _enough(rows: list[dict], num_rows: int, what: str) -> list[dict]:
    if len(rows) < num_rows:
        raise DataError(f"only {len(rows)} of the {num_rows} {what} asked for exist; ask for fewer rows")
    return rows


# ---- from the hub to a file ----


def build(name: str, *, num_rows: int = 0, seed: int = 0) -> list[dict]:
    """`blueorca` or `redorca` from the hub's data, in the size given above unless `num_rows` > 0.

    Raises:
      DataError: for another name, an unreachable hub, or more rows than there are.
    """
    if name not in ("blueorca", "redorca"):
        raise DataError(f"unknown recipe '{name}'; choose blueorca or redorca")
    if num_rows < 0:
        raise DataError(f"num_rows must not be negative, not {num_rows}")
    slimorca = tqdm.tqdm(hub(SLIMORCA), desc="SlimOrca", disable=None)
    if name == "blueorca":
        return blueorca(slimorca, num_rows=num_rows or BLUEORCA_ROWS, seed=seed)
    red_team = tqdm.tqdm(hub(RED_TEAM, data_dir=RED_TEAM_DIR), desc="red-teaming", disable=None)
    return redorca(slimorca, red_team, num_rows=num_rows or REDORCA_ROWS, seed=seed)


def main(argv: list[str] | None = None) -> None:
    """`python -m bilevel_jax.data.recipes blueorca|redorca --out=FILE.jsonl [--seed=0 --num_rows=N]`"""
    parser = argparse.ArgumentParser(prog="python -m bilevel_jax.data.recipes", allow_abbrev=False)
    parser.add_argument("name", choices=("blueorca", "redorca"))
    parser.add_argument("--out", required=True, help="the JSONL file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_rows", type=int, default=0, help="0: as many as the docstring says")
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
