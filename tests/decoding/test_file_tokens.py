"""Tokens of several bytes under a grammar of bytes, against a search of all that can follow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import FileTokens
from jaxgen.decoding.file_tokens import NEVER

pytestmark = pytest.mark.usefixtures("quick_compiles")

OPENS, CLOSES, END = b"()"[0], b"()"[1], 256
PIECES = (*(bytes([i]) for i in range(256)), b"", b"()", b"((", b"())", b")(", b"(((", b"(x", b"())))")
VOCAB = len(PIECES) + 2  # two that mean nothing


@dataclasses.dataclass(frozen=True)
class Brackets:
    """Balanced brackets, at most three open at once; the state counts them, in a vector for the sake of its shape."""

    shortest = 2

    def begin(self, shape):
        return jnp.full((*shape, 2), -1, jnp.int32), jnp.zeros(shape, bool)

    def move(self, state, byte):
        (open_, read), dead = (state[0][..., 0], state[0][..., 1]), state[1]
        now = jnp.maximum(open_, 0) + jnp.where(byte == OPENS, 1, -1)
        dead = dead | (now < 0) | (now > 3) | ((byte != OPENS) & (byte != CLOSES))
        return jnp.stack(jnp.broadcast_arrays(now, read), -1), dead

    def moves(self, state):
        return self.move((state[0][..., None, :], state[1][..., None]), jnp.arange(256))

    def least(self, state):
        open_ = state[0][..., 0]
        return jnp.where(state[1], NEVER, jnp.where(open_ < 0, 2, open_))


def dead(text):
    depth = [text[:i].count(b"(") - text[:i].count(b")") for i in range(len(text) + 1)]
    return bool(text.strip(b"()")) or min(depth) < 0 or max(depth) > 3


@functools.cache
def can_end(text, left):
    """Whether some tokens, at most `left`, make a file of it."""
    if dead(text):
        return False
    whole = text and text.count(b"(") == text.count(b")")
    return bool(whole) or (left > 0 and any(can_end(text + piece, left - 1) for piece in PIECES[40:42]))


def allowed(text, left):
    """By trying: with the bytes alone a file is ended last, and any ending in pairs is one in bytes that is no longer."""
    found = {token for token, piece in enumerate(PIECES) if piece and left > 0 and can_end(text + piece, left - 1)}
    return found | ({END} if text and can_end(text, 0) else set())


def walk(automaton):
    @jax.jit
    def run(tokens):
        def one(state, token):
            return automaton.move(state, token), automaton.allowed(state)

        state, found = jax.lax.scan(one, automaton.begin(tokens.shape[:1]), tokens.T)
        return found.swapaxes(0, 1), automaton.allowed(state)

    return run


@pytest.mark.parametrize("length", [2, 5])
def test_what_is_allowed_is_what_can_be_ended(length):
    rng = np.random.default_rng(length)
    rows = []
    for _ in range(40):  # what is allowed at random, and some rows with a mistake
        text, row = b"", []
        while len(row) < length:
            choice = sorted(allowed(text, length - len(row)))
            token = int(rng.choice(choice)) if row[-1:] != [END] else END
            row.append(token)
            text += PIECES[token]
        rows.append(row)
    seen = np.asarray(walk(FileTokens(Brackets(), length, PIECES, VOCAB))(np.array(rows))[0])
    for row, found in zip(rows, seen):
        for i in range(length):
            text, ended = b"".join(PIECES[token] for token in row[:i]), END in row[:i]
            assert set(np.flatnonzero(found[i])) == ({END} if ended else allowed(text, length - i))
    assert {token for row in rows for token in row} > {END, 257}


def test_rows_that_leave_the_grammar():
    """Behind a token that is not allowed everything is, for ever; at the end of the buffer a row is whole."""
    automaton = FileTokens(Brackets(), 4, PIECES, VOCAB)
    rows = np.array([[CLOSES, OPENS], [257, 300], [258, 260], [END, END], [257, 264], [OPENS, END], [259, OPENS]]) % VOCAB
    _, last = walk(automaton)(rows)
    assert np.asarray(last).all(-1).tolist() == [True, True, False, True, True, True, True]
    full = np.array([[OPENS, 259, 257, 257], [257, 257, 257, 257]])
    seen, last = walk(automaton)(full)
    assert np.flatnonzero(np.asarray(last)[1]).tolist() == [END] and not np.asarray(seen).all(-1).any()


def test_a_length_that_no_file_has():
    with pytest.raises(ValueError, match="length=1: the shortest file has 2 bytes"):
        FileTokens(Brackets(), 1, PIECES, VOCAB)
