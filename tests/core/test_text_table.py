import pytest

from kdcache.core.text_table import text_table


def test_words_stand_to_the_left_and_numbers_to_the_right():
    assert text_table(["run", "s"], [["student", "1"], ["t", "23.5"]], numbers=["s"]) == [
        "run         s",
        "-------  ----",
        "student     1",
        "t        23.5",
    ]


def test_no_line_ends_in_spaces_and_a_table_may_have_no_rows():
    assert text_table(["a", "b"], [["long", ""]]) == ["a     b", "----  -", "long"]
    assert text_table(["a"], []) == ["a", "-"]


def test_a_row_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        text_table(["a", "b"], [["only one"]])
