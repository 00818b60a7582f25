"""Text as it comes: joined, it is the decoded answer; characters come whole; stop strings are never said."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pangu_sigma.generation.text_stream import TextStream

SAME = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


def pushed_texts(stream: TextStream, ids) -> list[str]:
    parts = []
    for token in ids:
        parts.append(stream.push(token))
        if stream.stopped:
            return parts
    return [*parts, stream.close()]


@SAME
@given(prompt=TEXTS, answer=TEXTS)
def test_pieces_joined_are_the_answer_and_never_half_a_character(tokenizer, prompt, answer):
    parts = pushed_texts(TextStream(tokenizer, (tokenizer.eod_id, *tokenizer.encode(prompt))), tokenizer.encode(answer))
    assert "".join(parts) == answer
    assert "\N{REPLACEMENT CHARACTER}" in answer or not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


@SAME
@given(answer=st.text("ab\n<", max_size=40), stop=st.lists(st.text("ab\n<", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(tokenizer, answer, stop):
    stream = TextStream(tokenizer, (), tuple(stop))
    # One token a character, so that stop strings are cut everywhere.
    ids = [token for character in answer for token in tokenizer.encode(character)]
    stops = [index for index in (answer.find(text) for text in stop) if index >= 0]
    joined = "".join(pushed_texts(stream, ids))
    if not stops:
        assert joined == answer and not stream.stopped
        return
    # The stop string that is complete first ends the text, before the earliest beginning among those complete then.
    ends = min(answer.find(text) + len(text) for text in stop if text in answer)
    begins = min(answer[:ends].find(text) for text in stop if text in answer[:ends])
    assert joined == answer[:begins] and stream.stopped


@SAME
@given(ids=st.lists(st.integers(3, 335), max_size=40))
def test_any_tokens_at_all(tokenizer, ids):
    """Also bytes that are no character: what comes out is what decoding all at once gives."""
    assert "".join(pushed_texts(TextStream(tokenizer, ()), ids)) == tokenizer.decode(ids)


def test_text_that_cannot_become_a_stop_string_does_not_wait(tokenizer):
    stream = TextStream(tokenizer, (), ("<end>",))
    parts = [stream.push(token) for character in "a<b<end" for token in tokenizer.encode(character)]
    assert parts == ["a", "", "<b", "", "", "", ""] and stream.close() == "<end"
