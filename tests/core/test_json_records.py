import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from kdcache.core.errors import CacheDamaged, UsageError
from kdcache.core.json_records import brief, canonical_json, differences, from_json, to_json


@dataclass(frozen=True, kw_only=True)
class Inner:
    mean: tuple[float, ...] = ()
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    count: int = 1
    rate: float = 0.5
    flag: bool = False
    inner: Inner = field(default_factory=Inner)
    many: tuple[Inner, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.count < 0:
            raise ValueError(f"count is {self.count}: it must not be negative")
        if self.name == "forbidden":
            raise UsageError("name is forbidden", "another name")


FULL = Outer(
    name="α",
    count=2**60,
    rate=0.1,
    flag=True,
    inner=Inner(mean=(0.1, 1e-300), size=3),
    many=(Inner(), Inner(size=0)),
    versions={"torch": "2", "a.b": "1"},
)


def read(data, cls=Outer):
    return from_json(cls, data, where="file.json", error=CacheDamaged)


@pytest.mark.parametrize("record", [Outer(name=""), FULL], ids=["defaults", "full"])
def test_round_trip(record):
    data = to_json(record)
    assert read(json.loads(canonical_json(data))) == record
    assert to_json(read(data)) == data


def test_canonical_json_is_one_spelling():
    assert canonical_json({"b": [1, None], "a": "é"}) == b'{"a":"\\u00e9","b":[1,null]}'
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))


def test_a_whole_number_is_a_float_where_one_is_wanted():
    value = read({"name": "x", "rate": 2}).rate
    assert (value, type(value)) == (2.0, float)


@pytest.mark.parametrize(
    ("data", "found", "needed"),
    [
        ({"name": "x", "colour": 1, "size": 2}, "does not know: colour, size", "only count, flag, inner"),
        ({"name": "x", "inner": {"median": 1}}, "file.json: inner has a field that this version", "only mean, size"),
        ({"name": "x", "many": [{}, {"size": "3"}]}, "file.json: many[1]: size is '3'", "of type int"),
        ({"name": "x", "inner": {"mean": [0.5, None]}}, "file.json: inner: mean[1] is None", "of type float"),
        ({"name": "x", "inner": {"mean": "0.5"}}, "file.json: inner: mean is '0.5'", "of type tuple"),
        ({"name": "x", "inner": 3}, "file.json: inner holds 3", "a JSON object"),
        ({"name": "x", "versions": {"torch": 2}}, "file.json: versions.torch is 2", "of type str"),
        ({"name": "x", "versions": ["torch"]}, "file.json: versions is ['torch']", "of type dict"),
        ({"name": 3}, "file.json: name is 3", "of type str"),
        ({"name": None}, "file.json: name is None", "of type str"),
        ({"name": "x", "count": 1.0}, "file.json: count is 1.0", "of type int"),
        # JSON's true is an int to Python, and 0 and 1 are not flags.
        ({"name": "x", "count": True}, "file.json: count is True", "of type int"),
        ({"name": "x", "rate": True}, "file.json: rate is True", "of type float"),
        ({"name": "x", "flag": 1}, "file.json: flag is 1", "of type bool"),
        ({}, "'name'", "every field that Outer requires"),
        ([1], "file.json holds [1]", "a JSON object"),
        (None, "file.json holds None", "a JSON object"),
        ({"name": "x", "count": -1}, "file.json: count is -1: it must not be negative", ""),
    ],
)
def test_what_is_refused_is_named(data, found, needed):
    with pytest.raises(CacheDamaged) as caught:
        read(data)
    assert found in caught.value.found
    assert needed in caught.value.needed


def test_an_unknown_field_tells_what_to_do():
    with pytest.raises(CacheDamaged) as caught:
        read({"name": "x", "new": 1})
    assert "the kdcache version that wrote it" in caught.value.remedy


def test_a_long_value_is_cut_and_a_records_own_refusal_kept():
    with pytest.raises(CacheDamaged, match=r"count is '9{56}\.\.\.") as caught:
        read({"name": "x", "count": "9" * 1000})
    assert len(caught.value.found) < 100
    with pytest.raises(UsageError, match="name is forbidden"):
        read({"name": "forbidden"})


def test_differences_are_dotted_and_in_field_order():
    other = Outer(name="α", count=3, inner=Inner(mean=(0.1,), size=3), versions={"torch": "3", "zarr": "3"})
    assert differences(FULL, FULL) == []
    found = differences(FULL, other)
    assert [name for name, _, _ in found] == [
        "count",
        "rate",
        "flag",
        "inner.mean",
        *[name for name, _, _ in found if name.startswith("many")],
        "versions.torch",
        "versions.a.b",
        "versions.zarr",
    ]
    assert ("count", 2**60, 3) in found
    assert ("versions.torch", "2", "3") in found
    assert ("versions.zarr", None, "3") in found
    assert ("versions.a.b", "1", None) in found


def test_differences_pass_over_what_is_ignored_with_everything_below():
    other = Outer(name="β", versions={"torch": "3"})
    ignore = frozenset({"versions", "inner.mean", "many", "count", "rate", "flag"})
    assert differences(FULL, other, ignore=ignore) == [("name", "α", "β"), ("inner.size", 3, None)]


def test_values_in_messages_are_short_and_of_one_line():
    assert brief(np.zeros((3, 224, 224))) == "a ndarray of shape (3, 224, 224) and dtype float64"
    assert brief(np.float32(1.5)) == repr(np.float32(1.5))
    assert brief("a\nb") == repr("a\nb")
    assert len(brief([np.zeros(1000)] * 9)) == 60
    assert "\n" not in brief([np.eye(9)])
