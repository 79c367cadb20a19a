"""What `posttrain data show` prints: tables, a histogram of lengths, examples."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posttrain.data.registry import Stored
from posttrain.data.statistics import MEASURES, JsonRow, histogram, messages_of, spread, text_of

MOST_BINS, BAR = 16, 40
LONGEST_LINE = 160
Counter = Callable[[JsonRow], tuple[int, int]]
"""(all, targets) of a row."""


def show_dataset(stored: Stored, num_examples: int, model: str | None, as_json: bool) -> None:
    count = token_counter(model) if model else count_characters
    unit = "tokens" if model else "characters"
    counts = [count(row) for row in stored.read()]
    examples = list(spread_out(stored, num_examples))
    share = sum(targets for _, targets in counts) / max(1, sum(whole for whole, _ in counts))
    if as_json:
        lengths = {"unit": unit, **spread(whole for whole, _ in counts), "target_share": share}
        print(json.dumps({"manifest": stored.manifest, "lengths": lengths, "examples": examples}, indent=2))
        return
    print_head(stored)
    print_measures(stored.manifest["statistics"], unit if model else None, [whole for whole, _ in counts])
    print(f"\n{100 * share:.1f} % of the {unit} are targets")
    print_histogram([whole for whole, _ in counts], unit)
    for row in examples:
        print_example(row)


def count_characters(row: JsonRow) -> tuple[int, int]:
    """Targets are what the assistant says where it is trained."""
    whole = len(text_of(row))
    if "text" in row:
        return whole, whole
    trained = (m for m in messages_of(row) if m["role"] == "assistant" and m.get("train", True))
    return whole, 0 if "reference" in row else sum(len(message["content"]) for message in trained)


def token_counter(model: str) -> Counter:
    """Tokens of a row's samples in Harmony; tasks have a prompt and no targets, a pair is both its sides."""
    from posttrain.chat.conversation import Conversation, Message
    from posttrain.chat.render import renderer
    from posttrain.chat.tokenizer import Tokenizer
    from posttrain.recipes.quickstart import CHAT
    from posttrain.run.folder import RunFolder

    tokenizer = Tokenizer.load(RunFolder(Path()).model_folder(model))
    render = renderer(CHAT, tokenizer)

    def count(row: JsonRow) -> tuple[int, int]:
        if "text" in row:
            length = len(tokenizer.encode_with_specials(row["text"]))
            return length, length
        if "reference" in row:
            return len(render.prompt(Conversation.model_validate(row["prompt"]))), 0
        if "conversation" in row:
            made = render.samples(Conversation.model_validate(row["conversation"]))
        else:
            made = [render.render(side) for side in sides(row)]
        return sum(len(one.tokens) for one in made), sum(sum(one.targets) for one in made)

    def sides(row: JsonRow) -> Iterator[Conversation]:
        prompt = Conversation.model_validate(row["prompt"])
        before = tuple(message.model_copy(update={"train": False}) for message in prompt.messages)
        for side in ("chosen", "rejected"):
            said = tuple(Message.model_validate(message) for message in row[side])
            yield prompt.model_copy(update={"messages": (*before, *said)})

    return count


def spread_out(stored: Stored, count: int) -> Iterator[JsonRow]:
    """So many rows, evenly over the dataset."""
    total = stored.manifest["counts"]["rows"]
    count = min(count, total)
    wanted = {place * total // count for place in range(count)}
    return (row for place, row in enumerate(stored.read()) if place in wanted)


def print_head(stored: Stored) -> None:
    manifest, counts = stored.manifest, stored.manifest["counts"]
    print(f"{stored.key}  {stored.content}, {counts['rows']:,} rows, digest {stored.digest}")
    print(f"built {manifest['created_at']} in {stored.folder}")
    if manifest["parent"]:
        print(f"parent {manifest['parent']['key']} ({manifest['parent']['digest'][:12]})")
    for source in manifest["sources"]:
        place = source.get("path") or source.get("repo") or source.get("dataset") or source.get("world")
        shape = f", format {source['format']}" if "format" in source else ""
        print(f"  {source['rows']:>9,} rows from {source['kind']} {place}{shape}")
    for reason, count in counts["malformed"].items():
        print(f"  {count:>9,} left out: {reason}")
    if counts["filtered"]:
        print(f"  {counts['filtered']:>9,} filtered")


def print_measures(statistics: dict[str, Any], unit: str | None, lengths: list[int]) -> None:
    keys = ("min", "mean", "p50", "p95", "p99", "max")
    measured = {name: statistics[name] for name in MEASURES}
    if unit is not None:
        measured = {unit: spread(lengths), **measured}
    print()
    lines = [(name, *(f"{values[key]:,.10g}" for key in keys)) for name, values in measured.items()]
    print_table([("per row", *keys), *lines])
    if statistics["most_called"]:
        print(
            "\ntools by calls: " + ", ".join(f"{name} {count:,}" for name, count in statistics["most_called"].items())
        )
    print(f"\nduplicates: {statistics['duplicates']:,}")


def print_histogram(lengths: list[int], unit: str) -> None:
    bins = histogram(lengths, MOST_BINS)
    most = max(count for _, _, count in bins)
    label = max(len(f"{low:,} to {high:,}") for low, high, _ in bins)
    print(f"\nrows by {unit}")
    for low, high, count in bins:
        bar = "█" * round(BAR * count / most) or ("▏" if count else "")
        print(f"  {f'{low:,} to {high:,}':>{label}}  {bar} {count:,}")


def print_example(row: JsonRow) -> None:
    print(f"\n── {row['id']}")
    if "text" in row:
        print(shortened(row["text"]))
    for message in messages_of(row):
        words = (message["role"], message.get("channel"), message.get("recipient") or message.get("sender"))
        print(f"{' '.join(word for word in words if word)}: {shortened(message['content'])}")
    if "reference" in row:
        print(f"reference: {shortened(json.dumps(row['reference'], ensure_ascii=False))}")


def shortened(text: str) -> str:
    line = " ⏎ ".join(text.splitlines())
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} … ({len(text):,} characters)"


def measures_side_by_side(old: Stored, new: Stored) -> list[tuple[str, ...]]:
    """Rows and the middle of each measure, in both."""
    statistics = [one.manifest["statistics"] for one in (old, new)]
    lines: list[tuple[str, ...]] = [("rows", *(f"{one['rows']:,}" for one in statistics))]
    lines += [(f"{name}, median", *(f"{one[name]['p50']:,}" for one in statistics)) for name in MEASURES]
    return lines


def print_table(lines: list[tuple[str, ...]]) -> None:
    """Columns as wide as their widest cell, numbers to the right; the first line is the head."""
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(cell.replace(",", "").replace(".", "").isdigit() for cell in column[1:]) for column in columns]
    for line in lines:
        cells = zip(line, widths, numeric, strict=True)
        print("  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip())
