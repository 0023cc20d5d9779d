"""The sequential diffusion tokenizer: prefixes, streaming, its solver by hand, and what training sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.tokenizers.diffusion import DiffusionTokenizer
from jaxgen.tokenizers.diffusion_decoder import DiffusionDecoder

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]

TOKENIZER = DiffusionTokenizer(
    side=4,
    channels=1,
    patch=2,
    length=6,
    groups=3,
    vocab=16,
    width=4,
    hidden=16,
    heads=2,
    encoder_depth=1,
    causal_depth=1,
    decoder_depth=1,
    decoder_patch=2,
)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 4, 4, 1)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, 16, (3, 6))


@pytest.fixture(scope="module")
def variables(randomize):
    shapes = jax.eval_shape(TOKENIZER.init, jax.random.key(0), IMAGES)
    return jax.device_put(randomize(shapes))


@pytest.fixture(scope="module")
def run(variables):
    """`run(method, *inputs)`, compiled once a method and shape; `given` replaces the variables."""
    compiled = {}

    def call(method, *inputs, given=None):
        if method not in compiled:
            compiled[method] = jax.jit(lambda v, *x: TOKENIZER.apply(v, *x, method=method))
        return compiled[method](given or variables, *inputs)

    return call


def test_a_prefix_gives_the_first_previews(run):
    """Whatever follows; and all of it gives the image."""
    previews = run("previews", TOKENS)
    other = TOKENS.copy()
    other[:, 4:] = (other[:, 4:] + 5) % 16
    changed = run("previews", other)
    np.testing.assert_array_equal(previews[:2], changed[:2])
    assert (np.abs(previews[2] - changed[2]).max(axis=(1, 2, 3)) > 1e-4).all()
    np.testing.assert_allclose(run("previews", TOKENS[:, :4]), previews[:2], atol=1e-5)
    assert previews.shape == (3, 3, 4, 4, 1) and np.abs(previews).max() <= 1


def test_group_by_group_is_all_at_once(run, variables):
    """A stream's steps, which look at no token behind their group, against the scan."""
    want = run("previews", TOKENS)
    flow = TOKENIZER.apply(variables, 3, method="begin")
    for i in range(3):
        known = np.where(np.arange(6) < 2 * (i + 1), TOKENS, 0)
        flow, preview = run("advance", flow, known, jnp.int32(i))
        np.testing.assert_allclose(preview, want[i], atol=1e-5)
    np.testing.assert_allclose(np.clip(flow.x / TOKENIZER.std, -1, 1), want[-1], atol=1e-5)


def test_the_flow_is_followed_as_published(run, variables):
    """By hand: v pulls from noise (0) to data (1) along shifted times, x + dt (3 v - v') / 2, the first step by Euler."""
    vectors = run("vectors", TOKENIZER.apply(variables, TOKENS, method=lambda m, t: m.quantizer.lookup(t)))
    inner = {"params": variables["params"]["decoder"]}
    decode = jax.jit(lambda *x: TOKENIZER.bind(variables).decoder.clone(parent=None).apply(inner, *x))
    u = np.arange(4) / 3
    times = u / (u + 2 * (1 - u))
    x, before = np.broadcast_to(jax.random.normal(jax.random.key(0), (4, 4, 1)), (3, 4, 4, 1)), None
    for i in range(3):
        v = -np.asarray(decode(x, jnp.full(3, times[i]), vectors[:, 2 * i : 2 * i + 2]))
        slope = v if before is None else 1.5 * v - 0.5 * before
        shown = np.clip((x + (1 - times[i]) * slope) / 0.6, -1, 1)
        np.testing.assert_allclose(run("previews", TOKENS)[i], shown, atol=1e-4)
        x, before = x + (times[i + 1] - times[i]) * slope, v


def test_tokens_depend_on_the_image_and_on_earlier_queries(run, variables):
    """A query sees all patches and no later query: with another last query only the last feature moves."""
    features = run("features", IMAGES)
    moved = jax.tree.map(lambda x: x, variables)
    moved["params"]["queries"] = variables["params"]["queries"].at[-1].add(1.0)
    again = run("features", IMAGES, given=moved)
    np.testing.assert_allclose(again[:, :-1], features[:, :-1], atol=1e-5)
    assert (np.abs(again[:, -1] - features[:, -1]).max(-1) > 1e-3).all()
    for corner in ((0, 0), (3, 3)):
        changed = IMAGES.copy()
        changed[:, corner[0], corner[1]] += 1
        assert (np.abs(run("features", changed) - features).max(-1) > 1e-5).all()
    unit = np.asarray(features / np.linalg.norm(features, axis=-1, keepdims=True))
    codes = np.asarray(variables["params"]["quantizer"]["codebook"])
    codes = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
    np.testing.assert_array_equal(run("encode", IMAGES), (unit @ codes.T).argmax(-1))


def test_what_training_sees(run, variables):
    """The nearest step's group steers; at u = 1 the image is there already, and codes behind the group have no loss."""
    noise, u = np.random.default_rng(2).standard_normal(IMAGES.shape).astype(np.float32), np.array([0.1, 0.5, 1.0], np.float32)
    out = run("__call__", IMAGES, u, noise)
    vectors = run("vectors", out.quantized.features).reshape(3, 3, 2, -1)
    steer = np.stack([vectors[0, 0], vectors[1, 2], vectors[2, 2]])  # round(3 u), and the last group at most
    done = u / (u + 2 * (1 - u))
    x, at = 0.6 * IMAGES, done[:, None, None, None] * 0.6 * IMAGES + (1 - done[:, None, None, None]) * noise
    decoder, inner = TOKENIZER.bind(variables).decoder.unbind()
    velocity = np.asarray(jax.jit(decoder.apply)(inner, at, done, steer))
    np.testing.assert_allclose(out.error, np.square(velocity - (noise - x)).mean((1, 2, 3)) / 0.36, rtol=1e-4)
    np.testing.assert_allclose(out.images[2], IMAGES[2], atol=1e-5)
    z = np.asarray(out.quantized.vectors).reshape(3, 6, 4)
    codes = np.asarray(TOKENIZER.apply(variables, out.quantized.tokens, method=lambda m, t: m.quantizer.lookup(t)))
    read = np.array([[1, 1, 0, 0, 0, 0], [1] * 6, [1] * 6])
    error = (np.square(z - codes).mean(-1) * read).sum() / read.sum()
    assert out.quantized.loss == pytest.approx(1.25 * error, rel=1e-4)


def test_noise_and_seed(run, variables):
    """Pictures start from one noise for all rows, unless noise is given; another seed is another noise."""
    same = run("previews", np.broadcast_to(TOKENS[:1], TOKENS.shape))
    np.testing.assert_allclose(same[:, 0], same[:, 1], atol=1e-6)
    noise = jax.random.normal(jax.random.key(7), (4, 4, 1))
    given = TOKENIZER.apply(variables, TOKENS, jnp.broadcast_to(noise, IMAGES.shape), method="decode")
    seeded = TOKENIZER.clone(seed=7).apply(variables, TOKENS, method="decode")
    np.testing.assert_allclose(given, seeded, atol=1e-5)
    assert np.abs(given - run("previews", TOKENS)[-1]).max() > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(patch=3), "patch=3: does not divide side=4"),
        (dict(decoder_patch=3), "decoder_patch=3: does not divide"),
        (dict(groups=4), "groups=4: must divide length=6"),
        (dict(heads=3), "heads=3: hidden=16"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        TOKENIZER.clone(**fields)


def test_bad_input(variables):
    for tokens in (TOKENS[:, :3], TOKENS[:, :0], np.zeros((3, 8), int)):
        with pytest.raises(ValueError, match="expected 1 to 3 groups of 2"):
            TOKENIZER.apply(variables, tokens, method="decode")
    with pytest.raises(ValueError, match=r"images \(3, 6, 6, 1\): expected \[b, 4, 4, 1\]"):
        TOKENIZER.apply(variables, np.zeros((3, 6, 6, 1)), method="encode")


def test_what_the_decoder_says_in_its_midst(randomize):
    """The same with scanned blocks, from the same parameters; the velocity does not change, and later blocks have no part."""
    sizes = dict(patch=2, width=16, heads=2, depth=3)
    unrolled, scanned = DiffusionDecoder(**sizes), DiffusionDecoder(**sizes, scan_layers=True, remat=True)
    vectors = np.random.default_rng(2).standard_normal((3, 2, 16)).astype(np.float32)
    inputs = IMAGES, np.array([0.1, 0.5, 0.9], np.float32), vectors
    params = jax.device_put(randomize(jax.eval_shape(unrolled.init, jax.random.key(0), *inputs)))["params"]
    blocks = [params[f"blocks_{i}"] for i in range(3)]
    stacked = {name: x for name, x in params.items() if not name.startswith("blocks")}
    stacked["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
    changed = params | {"blocks_2": jax.tree.map(lambda x: 2 * x, blocks[2])}
    run = jax.jit(lambda model, p, some: [model.apply({"params": p}, *inputs, after) for after in some], static_argnums=(0, 2))
    velocity, *told = run(unrolled, params, (0, 1, 2, 3))
    other = run(unrolled, changed, (0, 1, 2, 3))[1:]
    assert all(np.allclose(x, y) for (_, x), (_, y) in zip(told[:2], other)) and not np.allclose(told[2][1], other[2][1])
    for got, hidden in told:
        assert hidden.shape == (3, 2, 2, 16)
        np.testing.assert_allclose(got, velocity, atol=1e-6)
    assert all(np.abs(told[i][1] - told[i + 1][1]).max() > 1e-3 for i in range(2))
    for want, got in zip((velocity, *told[1]), (lambda x: (x[0], *x[1]))(run(scanned, stacked, (0, 2)))):
        np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(ValueError, match="after=4: the decoder has 3 blocks"):
        run(unrolled, params, (4,))
