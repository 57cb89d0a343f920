"""Names on disk: every allowed id becomes one safe segment, no two become the same, and the rest is refused with a reason."""

from __future__ import annotations

import enum
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faultguard._core.names import check_key, check_prefix, check_worker_id, encode_name, record_name, record_number
from faultguard.errors import UsageError

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=128)
# Names from the characters that encoding has something to do with collide, if anything does.
TRICKY = st.text("a.%~/2E \xe9", min_size=1, max_size=300)
LONG = st.builds(lambda head, tail: head * 120 + tail, st.sampled_from(["a", "é", "~", "/"]), st.text("ab~%", max_size=8))

ODD_IDS = ["../../x", "a/b", "é", ".hidden", ".", "..", "...", "a" * 300, "é" * 256, " ", "-rf", "a\nb", "~", "%2E", "x#1", "con", "日本"]


@pytest.mark.parametrize("worker_id", ODD_IDS)
def test_odd_ids_are_allowed_and_safe(worker_id: str) -> None:
    """Whatever names a worker becomes one visible segment of at most 200 plain characters."""
    segment = encode_name(check_worker_id(worker_id))
    assert re.fullmatch(r"[A-Za-z0-9_%~-][A-Za-z0-9_.%~-]{0,199}", segment)


def test_plain_ids_stay_readable() -> None:
    """Ids of letters, digits, dots, dashes and underscores are their own names; others can be guessed."""
    assert [encode_name(name) for name in ("shard-7", "a_b.c", "a b", ".x")] == ["shard-7", "a_b.c", "a%20b", "%2Ex"]


@given(st.one_of(NAMES, TRICKY, LONG), st.one_of(NAMES, TRICKY, LONG))
def test_encoding_is_injective(one: str, other: str) -> None:
    """Two names are encoded alike only if they are the same."""
    assert (encode_name(one) == encode_name(other)) == (one == other)


@given(st.one_of(NAMES, TRICKY, LONG))
def test_the_encoding_of_any_name_is_a_key(name: str) -> None:
    """A segment is never empty, hidden, `..` or too long for a file name."""
    segment = encode_name(name)
    assert check_key(f"run/{segment}/000000001.json")
    assert len(segment.encode()) <= 200
    assert not segment.startswith(".")


def test_a_shortened_name_cannot_be_forged() -> None:
    """Naming a worker as a shortened segment looks gives another segment, because `~` is encoded."""
    segment = encode_name("a" * 300)
    assert "~" in segment
    assert encode_name(segment) != segment


def test_a_shortened_name_keeps_whole_escapes() -> None:
    """The readable head of a shortened name ends in no half of an escape."""
    for shift in range(4):
        head = encode_name("a" * shift + "é" * 200).partition("~")[0]
        assert re.fullmatch(r"(?:a|%C3|%A9)+", head)


@pytest.mark.parametrize(
    ("worker_id", "reason"),
    [
        ("", "empty"),
        (7, r"type 'int', not str"),
        (None, "'NoneType'"),
        (b"w0", "'bytes'"),
        ("a\0b", "NUL character at position 1"),
        ("a\ud800", "surrogate pair at position 1"),
        ("a" * 513, "513 bytes .* limit is 512"),
        ("é" * 257, "514 bytes .* limit is 512"),
    ],
    ids=["empty", "int", "none", "bytes", "nul", "surrogate", "long", "long in bytes"],
)
def test_bad_ids_are_refused_with_a_reason(worker_id: object, reason: str) -> None:
    """An id that cannot be stored is refused, and the short text says why and which."""
    with pytest.raises(UsageError, match=reason) as caught:
        check_worker_id(worker_id)
    assert str(caught.value).startswith("worker_id ")
    assert len(str(caught.value)) < 300


def test_a_subclass_of_str_becomes_a_plain_one() -> None:
    """An Enum member or NumPy string is taken by its value, and what goes on is a plain str."""

    class Shard(str, enum.Enum):
        FIRST = "first"

    assert (check_worker_id(Shard.FIRST), type(check_worker_id(Shard.FIRST))) == ("first", str)


def test_an_empty_name_has_no_segment() -> None:
    """An empty name, a bug of ours, is not turned into an empty segment."""
    with pytest.raises(ValueError, match="empty"):
        encode_name("")


@given(st.integers(1, 999_999_999), st.integers(1, 999_999_999))
def test_record_names_sort_as_numbers(one: int, other: int) -> None:
    """The order of names is the order of numbers, and a name gives its number back."""
    assert (record_name(one) < record_name(other)) == (one < other)
    assert record_number(record_name(one)) == one


@pytest.mark.parametrize("number", [0, -1, 1_000_000_000, 10**20])
def test_numbers_without_a_name_are_refused(number: int) -> None:
    """A number that would break the order of names (ten digits) is refused, not wrapped or widened."""
    with pytest.raises(ValueError, match=f"{number} has no name"):
        record_name(number)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "1.json",
        "0000000001.json",
        "000000000.json",
        "000000001.json.tmp",
        "000000001",
        "00000000a.json",
        "\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661.json",
        "\n000000001.json",
    ],
)
def test_other_names_have_no_number(name: str) -> None:
    """What is not the name of a record is not taken for one."""
    assert record_number(name) is None


@pytest.mark.parametrize("key", ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", "a/.tmp", "a\0b"])
def test_keys_cannot_leave_the_store(key: str) -> None:
    """A key that was not encoded is refused before it reaches a path."""
    with pytest.raises(ValueError, match="not a key"):
        check_key(key)


@pytest.mark.parametrize("prefix", ["a", "/", "../", "a//", "a/b", ".a/"])
def test_prefixes_end_in_a_slash(prefix: str) -> None:
    """A prefix is whole segments: `w1` must not list what belongs to `w10`."""
    with pytest.raises(ValueError, match="not a prefix"):
        check_prefix(prefix)
    assert check_prefix("") == ""
    assert check_prefix("a/b/") == "a/b/"
