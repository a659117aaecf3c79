"""The page of the soak."""


def lines(command: str, parts: dict) -> list[str]:
    """Lines of Markdown from the results of the parts, by name; "runs" is one of them."""

    def table(head: str, pairs) -> list[str]:
        return [f"| {head} | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in pairs), ""]

    one, page = parts["runs"], ["# Interruptions, faults and a long run", "", f"`{command}`", ""]
    pair_runs = parts.get("pairs", {"runs": 0, "kills": {}})
    mismatches = [line for part in parts.values() if isinstance(part, dict) for line in part.get("mismatches", ())]
    counts = [("runs ended", one["runs"]), ("tries", one["tries"]), ("runs killed", sum(one["kills"].values()))]
    for name in ("exports", "preparations", "reports"):
        if name in parts:
            counts += [(f"{name} ended", parts[name]["ended"]), (f"{name} killed", parts[name]["kills"])]
    counts += [("pairs of processes ended", pair_runs["runs"]), ("pairs of which one was killed", sum(pair_runs["kills"].values()))]
    counts += [("checkpoints damaged", sum(one["faults"].values())), ("damaged checkpoints set aside", one["set_aside"])]
    page += table("counts", [*counts, ("mismatches with the uninterrupted run", len(mismatches))])
    page += table("killed during", sorted(one["kills"].items())) + table("faults", sorted(one["faults"].items()))
    page += table("of two processes, killed during", sorted(pair_runs["kills"].items())) if pair_runs["kills"] else []
    page += [*hosts_lines(parts["hosts"]), ""] if "hosts" in parts else []
    page += [f"- {line}" for line in mismatches]
    if "long" in parts:
        long = parts["long"]
        values = {key: value for key, value in long.items() if not isinstance(value, dict)}
        for key in ("rss_mb", "live_arrays", "files"):
            values |= {f"{key}, {at.replace('_', ' ')}": value for at, value in long[key].items()}
        values |= {f"bytes of {name}": value for name, value in long["bytes"].items()}
        page += table("the long run", ((key.replace("_", " "), value) for key, value in values.items()))
    return page


def hosts_lines(part: dict) -> list[str]:
    """The table of faults of a run on two hosts."""
    rows = ["| two hosts | process 0 ended after | process 1 ended after |", "| --- | --- | --- |"]
    for fault in part["faults"]:
        cells = [f"{seconds} s: {line}" if code > 0 else "killed" for seconds, line, code in _ends(fault)]
        rows.append(f"| {fault['name']} | {' | '.join(cells)} |")
    return rows


def _ends(fault: dict):
    return zip(fault["seconds"], fault["lines"], fault["codes"])
