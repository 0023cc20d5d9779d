"""Against a quantiser in float64 that follows algorithms 1 and 2 of Tian et al. 2024 cell by cell."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.quantizers import MultiScaleQuantizer

pytestmark = pytest.mark.numeric

SCALES, SIDE, WIDTH, VOCAB = (1, 2, 3, 5), 5, 4, 12
PHIS = (0, 0, 1, 2)  # of four scales with three convolutions: ticks 1/6, 1/2, 5/6 against 0, 1/3, 2/3, 1


def area(x, n):
    m = x.shape[1]
    out = np.zeros((x.shape[0], n, n, x.shape[-1]))
    for i, j in np.ndindex(n, n):
        rows = slice(math.floor(i * m / n), math.ceil((i + 1) * m / n))
        cols = slice(math.floor(j * m / n), math.ceil((j + 1) * m / n))
        out[:, i, j] = x[:, rows, cols].mean((1, 2))
    return out


def bicubic(x, m):
    def kernel(d, a=-0.75):
        d = abs(d)
        if d < 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    n = x.shape[1]
    out = np.zeros((x.shape[0], m, m, x.shape[-1]))
    for i, j in np.ndindex(m, m):
        y, z = ((c + 0.5) * n / m - 0.5 for c in (i, j))
        for p in range(math.floor(y) - 1, math.floor(y) + 3):
            for q in range(math.floor(z) - 1, math.floor(z) + 3):
                out[:, i, j] += kernel(y - p) * kernel(z - q) * x[:, np.clip(p, 0, n - 1), np.clip(q, 0, n - 1)]
    return out


def conv3(x, p):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros(x.shape)
    for i, j in np.ndindex(*x.shape[1:3]):
        out[:, i, j] = np.einsum("bhwc,hwcd->bd", padded[:, i : i + 3, j : j + 3], p["kernel"])
    return out + p["bias"]


class Reference:
    """The quantiser, and what it leaves on the way."""

    def __init__(self, params, ratio=0.5, cosine=False):
        self.p = jax.tree.map(np.float64, params["params"])
        self.ratio, self.cosine = ratio, cosine

    def add(self, k, codes):
        """phi_k of the enlarged code map."""
        n = SCALES[k]
        grid = bicubic(codes.reshape(len(codes), n, n, WIDTH), SIDE)
        return (1 - self.ratio) * grid + self.ratio * conv3(grid, self.p[f"phi_{PHIS[k]}"])

    def choose(self, z):
        codebook = self.p["codebook"]
        if self.cosine:
            z, codebook = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (z, codebook))
        distance = np.square(z[:, :, None] - codebook).sum(-1)
        best = np.sort(distance, axis=-1)
        assert (best[..., 1] - best[..., 0]).min() > 1e-5  # the float32 quantiser has no excuse
        return distance.argmin(-1)

    def encode(self, f):
        rest, picture = f.astype(np.float64), np.zeros(f.shape)
        tokens, pictures, vectors = [], [], []
        for k, n in enumerate(SCALES):
            z = area(rest, n).reshape(len(f), n * n, WIDTH)
            ids = self.choose(z)
            h = self.add(k, self.p["codebook"][ids])
            rest, picture = rest - h, picture + h
            tokens.append(ids)
            pictures.append(picture)
            vectors.append(z.reshape(-1, WIDTH))
        return np.concatenate(tokens, 1), pictures, np.concatenate(vectors)

    def pictures(self, tokens):
        picture, out, start = np.zeros((len(tokens), SIDE, SIDE, WIDTH)), [], 0
        for k, n in enumerate(SCALES):
            picture = picture + self.add(k, self.p["codebook"][tokens[:, start : start + n * n]])
            start += n * n
            out.append(picture)
        return out


def module(**kwargs):
    return MultiScaleQuantizer(vocab=VOCAB, width=WIDTH, patch_nums=SCALES, phis=3, **kwargs)


@pytest.fixture(scope="module")
def case(randomize):
    rng = np.random.default_rng(5)
    features = rng.normal(size=(2, SIDE, SIDE, WIDTH)).astype(np.float32)
    shapes = jax.eval_shape(module().init, jax.random.key(0), features)
    params = jax.device_put(randomize(shapes, seed=6))
    out = jax.jit(module().apply)(params, features)
    return types.SimpleNamespace(features=features, params=params, out=out, reference=Reference(params))


def apply(method, case, *args, **kwargs):
    run = jax.jit(lambda params, *a: module(**kwargs).apply(params, *a, method=method))
    return run(case.params, *args)


def test_encode(case):
    tokens, _, _ = case.reference.encode(case.features)
    got = apply("encode", case, case.features)
    assert got.shape == (2, 39) and jnp.issubdtype(got.dtype, jnp.integer)
    np.testing.assert_array_equal(got, tokens)
    np.testing.assert_array_equal(case.out.tokens, tokens)


def test_encode_by_angle(case):
    tokens, _, _ = Reference(case.params, cosine=True).encode(case.features)
    np.testing.assert_array_equal(apply("encode", case, case.features, cosine=True), tokens)
    assert np.any(tokens != np.asarray(case.out.tokens))


def test_training_outputs(case):
    tokens, pictures, vectors = case.reference.encode(case.features)
    np.testing.assert_allclose(case.out.features, pictures[-1], atol=1e-5)
    np.testing.assert_allclose(case.out.vectors, vectors, atol=1e-5)
    np.testing.assert_array_equal(case.out.counts, np.bincount(tokens.reshape(-1), minlength=VOCAB))


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_loss(case, beta):
    _, pictures, _ = case.reference.encode(case.features)
    want = np.mean([(1 + beta) * np.square(case.features - p).mean() for p in pictures])
    loss = jax.jit(module(beta=beta).apply)(case.params, case.features).loss
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_pictures_decode_and_inputs(case):
    tokens = np.random.default_rng(7).integers(0, VOCAB, (3, 39))
    want = case.reference.pictures(tokens)
    for got, picture in zip(apply("pictures", case, tokens), want):
        np.testing.assert_allclose(got, picture, atol=1e-5)
    np.testing.assert_allclose(apply("decode", case, tokens), want[-1], atol=1e-5)
    inputs = np.concatenate([area(p, n).reshape(3, n * n, WIDTH) for p, n in zip(want, SCALES[1:])], axis=1)
    np.testing.assert_allclose(apply("inputs", case, tokens), inputs, atol=1e-5)


def test_feed_is_decode_a_scale_at_a_time(case):
    tokens = np.random.default_rng(8).integers(0, VOCAB, (2, 39))
    want = case.reference.pictures(tokens)

    def feed_all(params, tokens):
        picture = module().apply(params, 2, method="empty")
        out, start = [], 0
        for k, n in enumerate(SCALES):
            ids = tokens[:, start : start + n * n]
            picture, following = module().apply(params, picture, k, ids, method="feed")
            start += n * n
            out.append((picture, following))
        return out

    out = jax.jit(feed_all)(case.params, tokens)
    for k, (picture, following) in enumerate(out):
        np.testing.assert_allclose(picture, want[k], atol=1e-5)
        if k + 1 < len(SCALES):
            n = SCALES[k + 1]
            np.testing.assert_allclose(following, area(want[k], n).reshape(2, n * n, WIDTH), atol=1e-5)
    assert out[-1][1] is None


def test_feed_takes_mixtures_of_codes(case):
    rng = np.random.default_rng(9)
    picture = rng.normal(size=(2, SIDE, SIDE, WIDTH)).astype(np.float32)
    probs = rng.dirichlet(np.ones(VOCAB), (2, 4)).astype(np.float32)
    got, _ = jax.jit(lambda p, x, t: module().apply(p, x, 1, t, method="feed"))(case.params, picture, probs)
    want = picture + case.reference.add(1, probs @ case.reference.p["codebook"])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_gradients_pass_straight_through(case):
    weight = np.random.default_rng(10).normal(size=case.features.shape).astype(np.float32)

    def total(features, params):
        return jnp.sum(weight * module().apply(params, features).features)

    features, params = jax.jit(jax.grad(total, (0, 1)))(case.features, case.params)
    np.testing.assert_allclose(features, weight, atol=1e-6)
    assert not any(np.any(g) for g in jax.tree.leaves(params))  # the codebook learns from its loss alone


def test_gradients_of_the_loss(case):
    def loss(features, params):
        return module(beta=0.3).apply(params, features).loss

    grad, grad_params = jax.jit(jax.grad(loss, (0, 1)))(case.features, case.params)
    tokens, pictures, _ = case.reference.encode(case.features)
    # Commitment: the features are drawn to each picture, with weight beta.
    want = np.mean([0.3 * 2 * (case.features - p) / p.size for p in pictures], axis=0)
    np.testing.assert_allclose(grad, want, atol=1e-7)

    # The pictures are drawn to the features: central differences of the codebook term, the tokens held fixed.
    def codebook_term(reference):
        return np.mean([np.square(p - case.features).mean() for p in reference.pictures(tokens)])

    rng = np.random.default_rng(11)
    for path in (("codebook",), ("phi_1", "kernel"), ("phi_2", "bias")):
        direction = rng.normal(size=np.shape(_at(case.reference.p, path)))
        values = []
        for eps in (1e-5, -1e-5):
            moved = Reference(case.params)
            array = _at(moved.p, path)
            array += eps * direction
            values.append(codebook_term(moved))
        slope = (values[0] - values[1]) / 2e-5
        np.testing.assert_allclose(np.sum(_at(grad_params["params"], path) * direction), slope, rtol=1e-3)


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


# The authors' PhiPartiallyShared, asked for its convolution at k / (K - 1).
@pytest.mark.parametrize(
    ("phis", "assignment"),
    [
        (4, (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)),
        (4, (0, 1, 2, 3)),
        (4, (0, 0, 1, 1, 2, 2, 2, 3, 3)),
        (2, (0, 0, 1)),
        (3, (0, 0, 1, 2, 2)),
        (2, (0,) * 5 + (1,) * 5),
        (1, (0, 0, 0, 0)),
    ],
)
def test_which_convolution_a_scale_uses(phis, assignment):
    quantizer = MultiScaleQuantizer(patch_nums=tuple(range(1, len(assignment) + 1)), phis=phis)
    assert tuple(quantizer._phi_of(k) for k in range(len(assignment))) == assignment


def test_the_ratio_of_smoothing(case):
    tokens = np.random.default_rng(12).integers(0, VOCAB, (1, 39))
    want = Reference(case.params, ratio=0.2).pictures(tokens)[-1]
    np.testing.assert_allclose(apply("decode", case, tokens, phi_ratio=0.2), want, atol=1e-5)


def test_oblong_grids():
    quantizer = MultiScaleQuantizer(vocab=5, width=3, patch_nums=((1, 2), (2, 4)), phis=1)
    features = np.random.default_rng(0).normal(size=(2, 2, 4, 3)).astype(np.float32)

    @jax.jit
    def run(key, features):
        params = quantizer.init(key, features)
        tokens = quantizer.apply(params, features, method="encode")
        return tokens, quantizer.apply(params, tokens, method="decode"), quantizer.apply(params, features).features

    tokens, decoded, want = run(jax.random.key(0), features)
    assert tokens.shape == (2, 10)
    np.testing.assert_allclose(decoded, want, atol=1e-6)


def test_initial_codebook_is_uniform():
    features = np.zeros((1, 1, 1, 8), np.float32)
    quantizer = MultiScaleQuantizer(vocab=4000, width=8, patch_nums=(1,), codebook_init=0.25)
    codebook = np.asarray(jax.jit(quantizer.init)(jax.random.key(0), features)["params"]["codebook"])
    assert abs(codebook).max() <= 0.25
    np.testing.assert_allclose(codebook.std(), 0.25 / math.sqrt(3), rtol=0.02)


def test_errors(case):
    with pytest.raises(ValueError, match=r"features \(4, 5, 4\) do not have the shape \(5, 5, 4\)"):
        module().apply(case.params, case.features[:, :4])
    with pytest.raises(ValueError, match="phis=0"):
        MultiScaleQuantizer(phis=0, patch_nums=(1,)).init(jax.random.key(0), np.zeros((1, 1, 1, 32), np.float32))
    with pytest.raises(ValueError, match="38 positions; the order has 39"):
        module().apply(case.params, np.zeros((1, 38), np.int32), method="decode")
