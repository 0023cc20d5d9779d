"""The JPEG automaton against a parser of files, which reads bit by bit on the host; random files have to open."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Context, FileTokens, JpegGrammar, KVCache, Sequences, constrain, sample_tokens
from jaxgen.decoding.grammar import states_after
from jaxgen.decoding.step import Out
from jaxgen.orders import raster
from jaxgen.recipes.byte_images import jpeg_grammar
from jaxgen.tokenizers.bytes import END, from_tokens, to_tokens
from jaxgen.tokenizers.jpeg import JpegCodec
from jaxgen.tokenizers.pairs import BYTES, learn_pairs

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

GREY = JpegCodec((8, 16), 1, quality=75)
COLOUR = JpegCodec((16, 48), 3, quality=60, restart=2, header="frame")


def automaton(codec, length, pairs=BYTES):
    return FileTokens(jpeg_grammar(codec), length, pairs.pieces, len(pairs.pieces))


@functools.cache
def runner(codec, length):
    """(grammar, states and allowed tokens along a path)."""
    grammar = automaton(codec, length)

    @jax.jit
    def run(tokens):
        def one(state, token):
            return grammar.move(state, token), (grammar.allowed(state), state.phase)

        state, (allowed, _) = jax.lax.scan(one, grammar.begin(tokens.shape[:1]), tokens.T)
        return allowed.swapaxes(0, 1), grammar.allowed(state)

    return grammar, run


def parses(codec, data):
    try:
        codec.decode(data)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("codec", [GREY, COLOUR])
def test_accepts_files_and_refuses_what_is_none(codec):
    rng = np.random.default_rng(0)
    images = [np.full(codec.shape, 90, np.uint8), *rng.integers(0, 256, (5, *codec.shape), np.uint8)]
    files = [codec.encode(image) for image in images]
    length = 30 + max(map(len, files))
    _, run = runner(codec, length)
    tokens = np.stack([to_tokens(file, length) for file in files])
    allowed, _ = run(tokens)
    ok = np.take_along_axis(np.asarray(allowed), tokens[..., None], -1)[..., 0]
    assert ok.all()
    # `END` may come where a file ends, and nowhere else.
    for file, row in zip(files, np.asarray(allowed)):
        assert not row[: len(file), END].any() and (row[len(file) :].sum(-1) == 1).all()
    # One byte changed: the grammar and the parser agree on what is left of a file.
    broken = [bytearray(files[i % len(files)]) for i in range(24)]
    for file in broken:
        at = int(rng.integers(len(codec.head), len(file)))
        file[at] ^= int(rng.integers(1, 256))
    tokens = np.stack([to_tokens(bytes(file), length) for file in broken])
    allowed, _ = run(tokens)
    ok = np.take_along_axis(np.asarray(allowed), tokens[..., None], -1)[..., 0].all(-1)
    want = [parses(codec, bytes(file)) for file in broken]
    assert ok.tolist() == want and 0 < sum(want) < len(want)


@functools.cache
def learnt(codec, merges):
    rng = np.random.default_rng(5)
    return learn_pairs([codec.encode(rng.integers(90, 110, codec.shape).astype(np.uint8)) for _ in range(40)], merges)


@pytest.mark.parametrize(
    "codec, spare, merges", [(GREY, 0, 0), (GREY, 1, 0), (GREY, 6, 20), (COLOUR, 0, 0), (COLOUR, 0, 30), (COLOUR, 60, 30)]
)
def test_what_is_allowed_always_leads_to_a_file(codec, spare, merges):
    """Uniform draws among the allowed tokens, with no more room than the shortest file has bytes, and with more."""
    least = len(codec.head) + shortest(codec)
    with pytest.raises(ValueError, match=f"length={least - 1}: the shortest file has {least} bytes"):
        automaton(codec, least - 1)
    pairs = learnt(codec, merges)
    grammar = automaton(codec, least + spare, pairs)

    def step(params, cache, view, cond):
        return Out(jnp.zeros((*view.tokens.shape, grammar.vocab))), cache

    cache = KVCache.zeros(layers=1, batch=1, capacity=1, heads=1, head_size=1)  # the law is uniform: nothing is remembered
    options = dict(cache=cache, order=raster(least + spare), grammar=grammar, stop=END)
    draw = jax.jit(lambda key: sample_tokens(step, params=None, cond=None, batch=16, key=key, **options))
    tokens = draw(jax.random.key(1))
    files = [from_tokens(row, pairs) for row in np.asarray(tokens)]
    assert all(parses(codec, file) and codec.opens(codec.file(file)) for file in files)
    lengths = {len(file) for file in files}
    assert lengths == {least} if spare == merges == 0 else max(lengths) > least
    assert len(pairs) == merges and (np.asarray(tokens) > END).any() == (merges > 0)


def shortest(codec):
    """Bytes of a scan of nothing but differences of zero and ends of blocks: 6 bits a block of brightness, 4 of colour."""
    bits, total = sum(6 if component == 0 else 4 for component in codec.blocks), 0
    every = codec.restart or codec.mcus
    for start in range(0, codec.mcus, every):
        total += -(-bits * min(every, codec.mcus - start) // 8) + 2
    return total


def test_dead_ends_are_seen_before_they_are_entered():
    """At coefficient 62 a code for a run of two zeros leads nowhere, and neither do the first bits of one."""
    grammar, _ = runner(GREY, 80)
    state = grammar.begin(())
    state = state._replace(bytes=state.bytes._replace(coefficient=jnp.int32(62)))
    allowed = np.asarray(jax.jit(grammar.allowed)(state))
    prefix = [format(byte, "08b") for byte in range(256)]
    # Annex K.3.2: 0/1 is 00 (a bit of value follows), 1/1 is 1100, 2/1 is 11100, 0/0 is 1010.
    assert not any(allowed[i] for i, bits in enumerate(prefix) if bits.startswith("11100"))
    assert all(allowed[i] for i, bits in enumerate(prefix) if bits.startswith("1010" + "00"))
    assert any(allowed[i] for i, bits in enumerate(prefix) if bits.startswith("1100"))


def test_paths_of_drafts_are_followed():
    """As a transform: each query is in the state of its own path, and a draft that breaks the file allows everything."""
    grammar, _ = runner(GREY, 80)
    data = GREY.encode(np.random.default_rng(1).integers(0, 256, GREY.shape, np.uint8))
    tokens = np.array([[7, *data[:5]], [7, *data[:5]]], np.int32)  # a prompt of one token that is no byte of the file
    seq = Sequences(jnp.asarray(tokens), jnp.array([4, 6]), jnp.arange(2))
    drafts = np.array([[[-1, -1], [data[3], -1], [data[3], data[4]]], [[-1, -1], [data[5], -1], [END, -1]]])
    root = np.take_along_axis(tokens, np.array([[3], [5]]), 1)
    path = np.concatenate([np.broadcast_to(root[:, None], (2, 3, 1)), drafts], -1)
    context = Context(seq, jnp.asarray(path), None)
    logits = jnp.zeros((2, 3, 257))
    masked = np.asarray(jax.jit(lambda x: constrain(x, context, table=grammar, begin=1))(logits)) == 0
    walked = np.asarray(runner(GREY, 80)[1](np.array([[*data[:7]]]))[0])[0]
    for query, read in (((0, 0), 3), ((0, 1), 4), ((0, 2), 5), ((1, 0), 5), ((1, 1), 6)):
        np.testing.assert_array_equal(masked[query], walked[read])
    assert masked[1, 2].all()
    assert jax.tree.leaves(states_after(context, grammar, begin=1))[0].shape == (2, 3)


def test_bad_tables():
    with pytest.raises(ValueError, match="more codes of 1 bits than there are"):
        JpegGrammar(tables=(((3, *[0] * 15), b"\0\1\2"), ((1, *[0] * 15), b"\0")), blocks=((0, 1),), mcus=1)
