"""The H.264 automaton against a decoder: it takes what the encoder makes, and what it takes is read without an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import FileTokens, H264Grammar
from jaxgen.decoding.file_tokens import NEVER
from jaxgen.tokenizers.bytes import from_tokens
from jaxgen.tokenizers.pairs import BYTES

pytest.importorskip("av", reason="H.264 needs PyAV: pip install 'jaxgen[video]'")

from jaxgen.tokenizers.video import H264Codec  # noqa: E402

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]


def grammar_of(codec):
    down, across = (-(-size // 16) for size in codec.shape[1:3])
    return H264Grammar(headers=codec.headers, mbs=down * across, across=across, restart=codec.restart)


def clips(codec, count, rng):
    """Noise of several strengths around a bar that moves."""
    for i in range(count):
        x = rng.normal(128, rng.uniform(0, 50), codec.shape)
        for t, frame in enumerate(x):
            frame[:, 3 * t + i : 3 * t + i + 9] += 60
        yield np.clip(x, 0, 255).astype(np.uint8)


def valid(codec, data):
    try:
        codec.decode(data)
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module", params=[(32, 48, 4), (16, 32, 0)])
def world(request):
    """(codec, files, the fewest bytes that are to come after each byte)."""
    height, width, restart = request.param
    codec = H264Codec(frames=2, height=height, width=width, quantiser=36, restart=restart)
    grammar = grammar_of(codec)

    @jax.jit
    def run(tokens):
        def one(state, byte):
            state = grammar.move(state, byte)
            return state, grammar.least(state)

        return jax.lax.scan(one, grammar.begin(tokens.shape[:1]), tokens.T)[1].T

    files = [codec.encode(clip) for clip in clips(codec, 8, np.random.default_rng(restart))]

    length = 1 + max(map(len, files))

    def follow(files):
        rows = np.zeros((32, length), np.int32)
        for row, file in zip(rows, files):
            row[: len(file)] = list(file)
        return [found[: len(file)] for found, file in zip(np.asarray(run(rows)), files)]

    return codec, files, follow


def test_takes_what_the_encoder_makes(world):
    """To the last byte and no farther; only there a file is whole. The bound of what is to come is close."""
    codec, files, follow = world
    assert max(map(len, files)) > 2 * min(map(len, files))
    for file, least in zip(files, follow(files)):
        assert least[-1] == 0 and (least[:-1] > 0).all() and least.max() < NEVER
        assert (least - np.arange(len(file))[::-1]).max() < 40
    for least in follow([file + b"\0" for file in files]):
        assert least[-1] >= NEVER


def test_what_it_takes_is_read_without_an_error(world):
    """A byte or a bit changed: few files are still whole, and these have no error."""
    codec, files, follow = world
    rng, changed = np.random.default_rng(1), []
    for i in range(32):
        file = bytearray(files[i % len(files)])
        file[rng.integers(len(file))] ^= 1 << rng.integers(8) if i % 2 else rng.integers(1, 256)
        changed.append(bytes(file))
    taken = [least[-1] == 0 for least in follow(changed)]
    assert 0 < sum(taken) < 20
    assert all(valid(codec, file) for file, ok in zip(changed, taken) if ok)


def test_random_streams_have_no_errors():
    """Drawn among the allowed bytes, with as little room as there may be, and with more."""
    codec = H264Codec(frames=2, height=16, width=32, quantiser=40)
    grammar, rng = grammar_of(codec), np.random.default_rng(3)
    automaton = FileTokens(grammar, grammar.shortest + 45, BYTES.pieces, 257)
    law = jnp.zeros((2, automaton.vocab)).at[1, jnp.array([0, 3])].set(7.0)  # the second one loves escapes
    spare = jnp.arange(24) // 2 % 4 * 15

    @jax.jit
    def run(key):
        def one(state, key):
            allowed = jnp.where(automaton.allowed(state), law[jnp.arange(24) % 2], -jnp.inf)
            token = jax.random.categorical(key, allowed)
            return automaton.move(state, token), token

        begin = automaton.begin((24,))._replace(left=grammar.shortest + spare)
        return jax.lax.scan(one, begin, jax.random.split(key, automaton.length))[1].T

    tokens = np.asarray(run(jax.random.key(0)))
    files = [from_tokens(row) for row in tokens]
    assert all(valid(codec, file) for file in files)
    used = np.array([(row != 256).sum() for row in tokens])
    assert (used <= grammar.shortest + np.asarray(spare)).all() and len(set(used[np.asarray(spare) > 0])) > 8
    assert any(b"\0\0\3" in file for file in files[1::2])
    with pytest.raises(ValueError, match=f"length={grammar.shortest - 1}: the shortest file has {grammar.shortest} bytes"):
        FileTokens(grammar, grammar.shortest - 1, BYTES.pieces, 257)
    noise = [rng.bytes(60) for _ in range(20)]
    assert not any(codec.opens(codec.file(data)) for data in noise)


@pytest.mark.parametrize(
    "headers, message",
    [
        ((), "headers: 0 of them, expected a multiple of 2"),
        (("01100101",), "headers: 1 of them, expected a multiple of 2, the slices of a picture"),
        (("0110010", "01100101"), "headers: '0110010', expected bits, at least 8"),
        (("0110010x", "01100101"), "headers: '0110010x'"),
        (("01100101" + "0" * 16, "01100101"), "without two zero bytes"),
    ],
)
def test_bad_headers(headers, message):
    with pytest.raises(ValueError, match=message):
        H264Grammar(headers=headers, mbs=6, across=3, restart=4)
