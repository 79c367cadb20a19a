from posttrain.export.smoke import smoke_metrics, text_metrics


def test_metrics_by_hand() -> None:
    metrics = text_metrics("<|channel|>final<|message|>ab ab ab 12<|end|>")
    assert metrics == {
        "smoke_characters": 17.0,
        "smoke_distinct_characters": 9.0,  # f i n a l, space, b, 1, 2
        "smoke_letter_share": 11 / 17,
        "smoke_repeats": 2.0,  # "ab ab" twice
    }


def test_one_bad_text_fails_all() -> None:
    good = "The weather in Berlin is sunny today."
    assert smoke_metrics([good])["smoke_ok"] == 1
    for bad in ("", "<|end|>", "aaaaaaaaaaaaaaaa", "1234567890 , . ; : -", "again and " * 6):
        assert smoke_metrics([good, bad])["smoke_ok"] == 0, bad
    # Two words that follow each other four times are still let through, five times are not.
    assert smoke_metrics(["go home " * 4 + "quickly"])["smoke_repeats"] == 4
    assert smoke_metrics(["go home " * 5 + "quickly"])["smoke_ok"] == 0
