import pytest

from moe_dist.config.plain_yaml import MAX_BYTES, parse
from moe_dist.errors import UserError


def test_scalars_mean_what_they_look_like():
    text = "a: no\nb: off\nc: 1e-4\nd: 1:30\ne: 010\nf: 0x10\ng: [~, null, TRUE]\nh: 2020-01-01\ni: 1_000\nj: -.inf"
    assert parse(text, origin="t") == {
        "a": "no",
        "b": "off",
        "c": 1e-4,
        "d": "1:30",
        "e": 10,
        "f": 16,
        "g": [None, None, True],
        "h": "2020-01-01",
        "i": "1_000",
        "j": float("-inf"),
    }


def test_keys_stay_text():
    assert parse("3: a\non: b\nnull: c", origin="t") == {"3": "a", "on": "b", "null": "c"}


def test_aliases_and_merge_keys_work():
    assert parse("a: &x {q: 1}\nb: {<<: *x, r: 2}", origin="t") == {"a": {"q": 1}, "b": {"q": 1, "r": 2}}


LAUGHS = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "line 2: key 'a' was given before in line 1"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("a: !mine 3", "could not determine a constructor"),
        (LAUGHS, "once aliases are expanded"),
        ("a: &a [*a]", "refers to what contains it"),
        ("[" * 5000, "nested too deeply"),
        ("- " * 60 + "a", "nested deeper than"),
        ("a: [1", "f.yaml, line 1"),
        ("a: \x00", "f.yaml"),
        ("? [1]\n: 2", "a key has to be a word"),
        ("a: 1\n---\nb: 2", "another document"),
        ("a: " + "1" * 5000, "digits"),
        ("# " + "x" * MAX_BYTES, "larger than"),
    ],
)
def test_hostile_text_is_refused(text, message):
    with pytest.raises(UserError, match=r"f\.yaml") as caught:
        parse(text, origin="f.yaml")
    assert message in str(caught.value)
