from wording import (
    columns,
    common_prefix,
    count_words,
    indented,
    is_palindrome,
    run_lengths,
    shifted,
    shortened,
)


def test_shortened():
    assert shortened("abc", 3) == "abc"
    assert shortened("abcd", 3) == "ab~"
    assert shortened("", 2) == ""


def test_is_palindrome():
    assert is_palindrome("No lemon, no melon")
    assert not is_palindrome("lemons")
    assert is_palindrome("")


def test_count_words():
    assert count_words("a bb ccc dd", 2) == 3
    assert count_words("", 1) == 0
    assert count_words("one two", 3) == 2


def test_indented():
    assert indented(["a", "", "b"], 2) == ["  a", "", "  b"]
    assert indented([], 4) == []


def test_common_prefix():
    assert common_prefix("planet", "plan") == "plan"
    assert common_prefix("cat", "car") == "ca"
    assert common_prefix("", "x") == ""


def test_run_lengths():
    assert run_lengths("aabccc") == [("a", 2), ("b", 1), ("c", 3)]
    assert run_lengths("") == []


def test_shifted():
    assert shifted("xyz a!", 3) == "abc d!"
    assert shifted("az", 1) == "ba"


def test_columns():
    assert columns([["a", "bbb"], ["cc"], ["d", "e", "f"]]) == [2, 3, 1]
    assert columns([]) == []
