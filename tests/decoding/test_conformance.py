"""The conformance check, on methods that keep the law and on some that do not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.decoding import Coupled, NGram, Proposal, Rejection, Sequential
from jaxgen.decoding.conformance import check_exact, chi_square, total_variation

pytestmark = pytest.mark.usefixtures("quick_compiles")


@dataclasses.dataclass(frozen=True)
class Greedy:
    """A rule that keeps every draft, whatever the target says: it does not keep the law."""

    def __call__(self, level):
        return jnp.where(level.valid.any(1), jnp.argmax(level.valid, 1), -1), level.log_p


@dataclasses.dataclass(frozen=True)
class Reversed(Coupled):
    """Calls itself coupled and reads the noise backwards: the law is right, the tokens are others."""

    def __call__(self, level):
        return super().__call__(level._replace(gumbel=level.gumbel[:, ::-1]))


class Fixed(NGram):
    def propose(self, state, seq, transform, key):
        return Proposal(jnp.zeros((seq.length.shape[0], self.length), jnp.int32)), state


@pytest.fixture(scope="module")
def check(table_model):
    model = table_model(vocab=3)
    params = model.params(0)
    return lambda methods, **options: check_exact(
        model.step, methods, params=params, cache=model.cache, vocab=3, prompt=(1,), **{"rows": 1024, "batches": 2} | options
    )


def test_methods_that_keep_the_law(check):
    methods = {"plain": lambda p: (Sequential(), Rejection()), "coupled": lambda p: (Fixed(2), Coupled())}
    rows = check(methods, stop=(2,), top_k=2)
    assert [row["method"] for row in rows] == ["plain", "plain", "coupled", "coupled"]
    assert all(abs(row["z"]) < 4 for row in rows) and rows[0]["tokens a call"] == 1
    assert rows[2]["same tokens"] and rows[2]["tokens a call"] > 1


def test_methods_that_do_not_are_named(check):
    with pytest.raises(ValueError, match=r"do not keep the model's law:\n- all drafts at temperature 0.7: z = "):
        check({"plain": lambda p: (Sequential(), Rejection()), "all drafts": lambda p: (Fixed(2), Greedy())})
    with pytest.raises(ValueError, match="backwards at temperature 1.3: other tokens than plain sampling"):
        check({"backwards": lambda p: (Fixed(2), Reversed())}, temperatures=(1.3,))
    with pytest.raises(ValueError, match="19683 sequences|59049 sequences"):
        check({}, length=10)


def test_the_statistics_on_known_counts():
    law = {(0,): 0.5, (1,): 0.3, (2,): 0.2}
    rng = np.random.default_rng(0)
    deviates = []
    for _ in range(300):
        counts = rng.multinomial(1000, list(law.values()))
        deviates.append(chi_square({(i,): int(n) for i, n in enumerate(counts)}, law))
    assert abs(np.mean(deviates)) < 0.2 and 0.85 < np.std(deviates) < 1.15
    assert chi_square({(0,): 400, (1,): 400, (2,): 200}, law) > 5
    assert chi_square({(3,): 1}, law) == float("inf")
    assert total_variation({(0,): 1, (1,): 1}, law) == pytest.approx(0.2)


def test_rows_that_jax_gives_are_counted(check):
    """One trace for all keys and temperatures."""
    traces = []

    def method(prompt):
        traces.append(isinstance(prompt, jax.core.Tracer))
        return Sequential(), Rejection()

    check({"plain": method})
    assert len(traces) == 2  # once to see the rule, once to compile
