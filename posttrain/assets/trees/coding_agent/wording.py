def shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return text[: most - 1] + "~"


def is_palindrome(text: str) -> bool:
    letters = [letter.lower() for letter in text if letter.isalnum()]
    return letters == letters[::-1]


def count_words(text: str, shortest: int) -> int:
    count = 0
    for word in text.split():
        if len(word) >= shortest:
            count += 1
    return count


def indented(lines: list[str], width: int) -> list[str]:
    found = []
    for line in lines:
        if line == "":
            found.append(line)
        else:
            found.append(" " * width + line)
    return found


def common_prefix(first: str, second: str) -> str:
    size = 0
    while size < len(first) and size < len(second) and first[size] == second[size]:
        size += 1
    return first[:size]


def run_lengths(text: str) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    for letter in text:
        if runs and runs[-1][0] == letter:
            runs[-1] = (letter, runs[-1][1] + 1)
        else:
            runs.append((letter, 1))
    return runs


def shifted(text: str, by: int) -> str:
    found = ""
    for letter in text:
        if "a" <= letter <= "z":
            found += chr((ord(letter) - 97 + by) % 26 + 97)
        else:
            found += letter
    return found


def columns(rows: list[list[str]]) -> list[int]:
    widths: list[int] = []
    for row in rows:
        for place, cell in enumerate(row):
            if place >= len(widths):
                widths.append(len(cell))
            elif len(cell) > widths[place]:
                widths[place] = len(cell)
    return widths
