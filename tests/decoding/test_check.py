"""The check passes models that keep the contract and says, for each way of breaking it, which."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxgen.decoding import KVCache, Out
from jaxgen.decoding.check import check_step

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("quick_compiles")]
V, D, B = 7, 8, 3


def params(seed=0):
    shapes = {"e": (V, D), "p": (32, D), "q": (D, D), "k": (D, D), "o": (D, V)}
    return {name: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), x) for i, (name, x) in enumerate(shapes.items())}


def step(params, cache, view, cond, *, change=None):
    """One attention layer; `change` breaks it in one way."""
    tokens = jnp.roll(view.tokens, 1, axis=0) if change == "rows" else view.tokens
    mask = jnp.ones_like(view.mask) if change == "mask" else view.mask
    pos = view.pos[:, :1] + jnp.arange(view.pos.shape[1]) if change == "tree positions" else view.pos
    x = params["e"][tokens] + params["p"][pos]
    q, k = x @ params["q"], x @ params["k"]
    cache = cache.stage(0, k[:, :, None], x[:, :, None])
    keys, values, visible = cache.read(0, x.shape[1], mask)
    scores = jnp.einsum("bqd,bsd->bqs", q, keys[:, :, 0]) * 0.3
    if change == "staged":
        visible = jnp.arange(keys.shape[1]) <= cache.length[:, None, None] + 2
        visible = jnp.broadcast_to(visible, scores.shape)
    else:
        visible = visible[:, 0]
    out = jnp.einsum("bqs,bsd->bqd", jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1), values[:, :, 0])
    logits = (x + out) @ params["o"]
    if change == "advance":
        cache = cache.commit(x.shape[1])
    if change == "nan":
        logits = logits.at[0, 0, 0].set(jnp.nan)
    if change == "shape":
        logits = logits[:, -1:]
    return Out(logits), cache


def check(**options):
    cache = KVCache.zeros(layers=1, batch=B, capacity=16, heads=1, head_size=D)
    change = options.pop("change", None)
    run = lambda *args: step(*args, change=change)  # noqa: E731
    check_step(run, params=params(), cache=options.pop("cache", cache), cond=None, batch=B, vocab=V, **options)


def test_models_that_keep_the_contract_pass(table_model):
    check()
    model = table_model(vocab=4)
    check_step(model.step, params=model.params(0), cache=model.cache(B), cond=None, batch=B, vocab=4, length=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", r"params of shape \(3, 1, 7\) for 7 tokens in 3 rows"),
        ("nan", "not finite"),
        ("advance", "advances its own cache"),
        ("mask", "a token changes the laws before it"),
        ("rows", "depends on the tokens of other rows"),
        ("tree positions", "another law than its path alone"),
        ("staged", "staged but not committed|a token changes the laws"),
    ],
)
def test_each_way_of_breaking_it_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        check(change=change)


class _Forgetful(KVCache):
    """Commits a path as if it were the first slots."""

    def commit(self, n, path=None):
        return dataclasses.replace(self, length=self.length + n)


def test_a_cache_that_drops_the_path_is_named():
    jax.tree_util.register_pytree_node_class(_Forgetful)
    cache = _Forgetful.zeros(layers=1, batch=B, capacity=16, heads=1, head_size=D)
    with pytest.raises(ValueError, match="of a tree's path"):
        check(cache=cache)
    check(cache=cache, trees=False)


def test_bad_arguments():
    with pytest.raises(ValueError, match="batch=1"):
        check_step(step, params=None, cache=None, cond=None, batch=1, vocab=V)
