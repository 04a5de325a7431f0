import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tg_tinker_server.engine.text import TextStream
from tg_tinker_server.engine.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()


def stream_of(tokens, **options):
    stream = TextStream(BYTES.decode, **options)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return stream, [*pieces, stream.finish()]


@given(text=st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_text_and_none_holds_half_a_character(text):
    _, pieces = stream_of(text.encode())
    assert "".join(pieces) == text
    assert all(piece in text for piece in pieces)


@given(tokens=st.lists(st.integers(0, 259), max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_join_to_what_decoding_them_at_once_gives(tokens):
    _, pieces = stream_of(tokens)
    whole = BYTES.decode(tokens)
    joined = "".join(pieces)
    assert whole in (joined, joined + "\ufffd")  # an end that may be half a character is dropped


@given(
    text=st.text(alphabet="abä", max_size=30),
    stops=st.lists(st.text(alphabet="abä", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=500, deadline=None)
def test_text_ends_before_the_first_stop_sequence_and_never_shows_part_of_it(text, stops):
    stream, pieces = stream_of(text.encode(), stop_sequences=stops)
    # The first stop to be completed ends the text, and of those completed together the one that begins first.
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if not ends:
        assert "".join(pieces) == text
        assert not stream.stopped
        return
    end = min(ends)
    begin = min(text[:end].find(s) for s in stops if s in text[:end])
    assert "".join(pieces) == text[:begin]
    assert stream.stopped


def test_a_possible_beginning_of_a_stop_is_held_back_until_it_is_certain():
    stream = TextStream(BYTES.decode, stop_sequences=["STOP"])
    assert [stream.push(b) for b in b"aSTxSTO"] == ["a", "", "", "STx", "", "", ""]
    assert stream.finish() == "STO"


def test_nothing_comes_after_a_stop():
    stream, pieces = stream_of(b"ab", stop_sequences=["a"])
    assert pieces == ["", ""]
    assert stream.push(ord("c")) == ""
    assert stream.finish() == ""


def test_a_tokenizer_that_drops_the_space_at_a_texts_start_keeps_it_between_prompt_and_completion():
    words = ["", " Once", " upon", " a", " time"]

    def decode(ids):
        return "".join(words[i] for i in ids).removeprefix(" ")

    stream = TextStream(decode, context=[1, 2])
    assert [stream.push(3), stream.push(4)] == [" a", " time"]


def test_a_character_begun_in_the_prompt_is_completed():
    euro = list("€".encode())
    stream = TextStream(BYTES.decode, context=euro[:2])
    assert stream.push(euro[2]) == "€"


@pytest.mark.parametrize("end", [b"\xf0", b"\xf0\x9f", b"\xf0\x9f\x98"])
def test_an_incomplete_last_character_is_dropped(end):
    assert "".join(stream_of(b"ok" + end)[1]) == "ok"


def test_special_tokens_have_no_text():
    assert BYTES.decode([256, *b"hi", 257, 258]) == "hi"
