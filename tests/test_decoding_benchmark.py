import jax
import numpy as np
import pytest

from jaxgen import decoding_benchmark
from jaxgen.generators.language import LanguageModel


def test_a_row_a_method_and_the_loop_alone():
    rows = list(decoding_benchmark.bench(size="small", batches=(1,), new_tokens=4, repeats=1, only="plain"))
    plain, torch = rows
    assert plain["method"] == "plain" and plain["tokens a call"] == 1 and plain["ms a token"] > 0
    assert torch["method"] == "PyTorch, plain" and ("not run" in torch or torch["ms a token"] > 0)
    (alone, drafts) = decoding_benchmark.loop_overhead(batches=(1,), steps=8, repeats=1)
    assert alone["us a call"] > 0 and "Jacobi" in drafts["method"]
    with pytest.raises(ValueError, match="size 'huge' is not one of 25m, small"):
        decoding_benchmark.byte_model("huge")


def test_the_peer_is_the_same_model():
    pytest.importorskip("torch", reason="the peer is PyTorch, which is not installed")
    model = LanguageModel(vocab=256, width=16, heads=2, depth=2)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    variables = model.init(jax.random.key(0), tokens)
    variables = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), variables)
    run = decoding_benchmark.torch_sampler(variables, model, tokens, 3)
    np.testing.assert_allclose(run.logits(tokens), model.apply(variables, tokens)[:, -1], atol=1e-4)
    seconds, calls = run(0)
    assert seconds > 0 and calls == 3
