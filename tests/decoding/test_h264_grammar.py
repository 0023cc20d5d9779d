"""The automaton of H.264 units against a parser of whole streams; random streams open in an ordinary reader."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import FileTokens, H264Grammar
from jaxgen.tokenizers.bytes import END, from_tokens, to_tokens
from jaxgen.tokenizers.pairs import BYTES
from jaxgen.tokenizers.video import H264Codec

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

HEADERS = (b"\x65\x88", b"\x41", b"\x41\x9a\x21")
LENGTH = 40


def parses(headers, data):
    """By what a reader does: it looks for start codes, then at each unit alone."""
    units = data.split(b"\0\0\1")
    if len(units) != len(headers) or not all(unit.startswith(header) for unit, header in zip(units, headers)):
        return False
    bodies = [unit[len(header) :] for unit, header in zip(units, headers)]
    if any(not body.strip(b"\0") or body.endswith(b"\0") for body in bodies):
        return False
    return not any(re.search(rb"\x00\x00[\x00\x02]|\x00\x00\x03[^\x00-\x03]|\x00\x00\x03$", unit, re.S) for unit in units)


def automaton(headers, length):
    return FileTokens(H264Grammar(headers=headers), length, BYTES.pieces, 257)


def follow(grammar):
    """Tokens [b, l] -> (allowed tokens before each of them, and behind the last)."""

    @jax.jit
    def run(tokens):
        def one(state, token):
            return grammar.move(state, token), grammar.allowed(state)

        state, allowed = jax.lax.scan(one, grammar.begin(tokens.shape[:1]), tokens.T)
        return allowed.swapaxes(0, 1), grammar.allowed(state)

    return run


def streams(rng, count):
    """Units of few different bytes, some right and some wrong in one place."""
    for _ in range(count):
        bodies = [bytes(rng.choice([0, 0, 1, 2, 3, 4, 200], rng.integers(1, 6)).astype(np.uint8)) for _ in HEADERS]
        yield b"\0\0\1".join(header + body for header, body in zip(HEADERS, bodies))


def test_accepts_streams_and_refuses_what_is_none():
    rng = np.random.default_rng(0)
    good = b"\0\0\1".join([HEADERS[0] + b"\0\7\0\0\3\1", HEADERS[1] + b"\5", HEADERS[2] + b"\0\0\3\0\1"])
    files = [good, good[:-1], good + b"\0", good.replace(b"\x9a", b"\x9b"), good + b"\0\0\1\x41\5", good[2:], *streams(rng, 3000)]
    want = np.array([parses(HEADERS, file) for file in files])
    allowed, _ = follow(automaton(HEADERS, LENGTH))(np.stack([to_tokens(file, LENGTH) for file in files]))
    tokens = np.stack([to_tokens(file, LENGTH) for file in files])
    ok = np.take_along_axis(np.asarray(allowed), tokens[..., None], -1)[..., 0].all(-1)
    wrong = [files[i] for i in np.flatnonzero(ok != want)]
    assert not wrong and want[0] and not want[1:6].any() and 100 < want.sum() < 2000
    # `END` may come where a stream ends and nowhere else, and nothing may follow it.
    row = np.asarray(allowed)[0]
    assert not row[: len(good), END][:-1].any() or row[len(good), END]
    assert (row[len(good) + 1 :].sum(-1) == 1).all() and row[-1, END]


def draws(grammar, seed):
    """Streams of bytes that are drawn among the allowed ones; those that matter to the grammar are likely."""
    law = jnp.zeros(grammar.vocab).at[jnp.array([0, 1, 3])].set(3.0)

    @jax.jit
    def run(key):
        def one(state, key):
            token = jax.random.categorical(key, jnp.where(grammar.allowed(state), law, -jnp.inf))
            return grammar.move(state, token), token

        return jax.lax.scan(one, grammar.begin((64,)), jax.random.split(key, grammar.length))[1].T

    return [from_tokens(row) for row in np.asarray(run(jax.random.key(seed)))]


@pytest.mark.parametrize("spare", [0, 1, 7])
def test_what_is_allowed_always_leads_to_a_stream(spare):
    """With no more room than the shortest stream has, and with more; zeros and ones are likely."""
    least = sum(len(header) + 1 for header in HEADERS) + 3 * (len(HEADERS) - 1)
    with pytest.raises(ValueError, match=f"length={least - 1}: the shortest file has {least} bytes"):
        automaton(HEADERS, least - 1)
    files = draws(automaton(HEADERS, least + spare), seed=spare)
    assert all(parses(HEADERS, file) for file in files)
    assert max(map(len, files)) == least + spare


def test_random_streams_open():
    """Of a codec's headers: an ordinary reader shows all pictures of most, though their bits are random."""
    pytest.importorskip("av", reason="H.264 needs PyAV: pip install 'jaxgen[video]'")
    codec = H264Codec(frames=3, height=16, width=32, restart=1)
    files = draws(automaton(codec.headers, 120), seed=5)
    assert all(parses(codec.headers, file) for file in files)
    opened = np.mean([codec.opens(codec.file(file)) for file in files])
    free = [np.random.default_rng(i).bytes(120) for i in range(64)]
    assert opened > 0.5 and not any(codec.opens(codec.file(file)) for file in free)


@pytest.mark.parametrize("headers", [(), (b"\x41", b"")])
def test_bad_headers(headers):
    with pytest.raises(ValueError, match="headers="):
        H264Grammar(headers=headers)
