import pytest
from jax.sharding import PartitionSpec as P

from jaxgen.train import check_rules, parse_rules

STAGES = (("tokenizer/params/conv/kernel",), ("generator/params/head/kernel", "generator/params/embed/embedding"))


@pytest.mark.parametrize(
    "text, rule",
    [
        ("head/kernel=fsdp,tensor", ("head/kernel", P("fsdp", "tensor"))),
        ("embed= -, fsdp + tensor", ("embed", P(None, ("fsdp", "tensor")))),
        ("norm=", ("norm", P())),
        ("a(?=b)=data", ("a(?=b)", P("data"))),
    ],
)
def test_rules_as_text(text, rule):
    assert parse_rules([text]) == (rule,)


@pytest.mark.parametrize(
    "text, message",
    [
        ("head/kernel", "expected PATTERN=AXES"),
        ("=fsdp", "expected PATTERN=AXES"),
        ("head(=fsdp", "'head(' is no regular expression"),
        ("head=model", "unknown axis 'model'; known: data, fsdp, tensor, sequence, and - for none"),
        ("head=fsdp,fsdp", "axis 'fsdp' is given twice"),
    ],
)
def test_text_that_is_no_rule(text, message):
    with pytest.raises(ValueError) as error:
        parse_rules(["norm=", text])
    assert str(error.value).startswith(f"--shard {text!r}: ") and message in str(error.value)


def test_every_pattern_has_to_find_something():
    check_rules(parse_rules(["head/kernel=fsdp", "conv="]), STAGES)
    check_rules((), STAGES)
    with pytest.raises(ValueError) as error:
        check_rules(parse_rules(["head/kernel=fsdp", "embed/kernel=fsdp"]), STAGES)
    message = str(error.value)
    assert message.startswith("--shard pattern 'embed/kernel' matches no parameter; there are generator/params/")


def test_two_patterns_that_fight():
    check_rules(parse_rules(["head/kernel=fsdp", "generator.*kernel=fsdp"]), STAGES)  # want the same
    with pytest.raises(ValueError) as error:
        check_rules(parse_rules(["head/kernel=fsdp", "embed=", "generator=tensor"]), STAGES)
    text = f"fight over generator/params/embed/embedding: {P()} and {P('tensor')}"
    assert str(error.value) == f"--shard patterns 'embed' and 'generator' {text}"
