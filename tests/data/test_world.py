"""The picture world: what is drawn, what is said, and the oracle, on its own pictures and on corrupted ones."""

import dataclasses
import itertools
import pickle

import numpy as np
import pytest

from jaxgen import config as config_lib
from jaxgen.data import DataConfig, World, WorldConfig, batches, info, make_source
from jaxgen.data.world_captions import PLACES, Backdrop, Caption, Count, Place, Relation, Thing, parse, place_of, say
from jaxgen.data.world_oracle import attribute_scores, caption_score, check, class_score, find_blobs, perceive
from jaxgen.data.world_render import coverage, distance, render
from jaxgen.data.world_scene import BACKGROUNDS, CLASSES, COLOURS, GAP, MARGIN, REACH, SHAPES, SIZES, Object, Scene, draw_scene

MANY = World(WorldConfig(most=4))


@pytest.fixture(scope="module")
def examples():
    return [MANY.example(i) for i in range(60)]


def test_pictures_are_a_function_of_the_index():
    again = pickle.loads(pickle.dumps(World(WorldConfig(most=4))))
    for i in (0, 7, 10**12):
        first, second = MANY.example(i), again.example(i)
        np.testing.assert_array_equal(first["picture"]["image"], second["picture"]["image"])
        assert first["caption"] == second["caption"] and first["scene"] == second["scene"]
        np.testing.assert_array_equal(MANY[i]["image"], first["picture"]["image"])
        assert MANY[i]["label"] == first["label"] == first["scene"].objects[0].label
    scenes = [
        World(config, split).example(i)["scene"]
        for config in (WorldConfig(most=4), WorldConfig(most=4, seed=1))
        for split in ("train", "test")
        for i in range(3)
    ]
    assert len(set(scenes)) == len(scenes)
    with pytest.raises(IndexError, match="index -1"):
        MANY[-1]
    with pytest.raises(ValueError, match="split 'valid'"):
        World(split="valid")
    assert MANY.name(3) == "world train[3]"


def test_scenes_keep_their_distances():
    config = WorldConfig(height=32, width=64, fewest=2, most=4)
    for i in range(40):
        scene = draw_scene(config, np.random.default_rng(i))
        assert 2 <= len(scene.objects) <= 4 and scene.background in BACKGROUNDS
        assert list(scene.objects) == sorted(scene.objects, key=lambda o: o.depth)
        for o in scene.objects:
            low, high = SIZES[o.size]
            assert low <= o.radius <= high and 0 <= o.depth < 1
            reach = REACH[o.shape] * o.radius
            assert reach + MARGIN <= min(2 * o.x, 2 - 2 * o.x, o.y, 1 - o.y) + 1e-9
            assert min(abs(v - third / 3) for v in (o.x, o.y) for third in (1, 2)) >= 0.03
        for a, b in itertools.combinations(scene.objects, 2):
            apart = np.hypot(2 * (a.x - b.x), a.y - b.y)
            assert apart >= REACH[a.shape] * a.radius + REACH[b.shape] * b.radius + GAP - 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_the_area_and_centre_they_should(shape):
    """Counted on a fine grid; and no point of a shape is beyond its reach."""
    drawn = coverage(shape, 60.3, 58.9, 30.0, 120, 120)
    assert drawn.sum() == pytest.approx(np.pi * 30**2, rel=2e-3)
    rows, columns = np.mgrid[:120, :120] + 0.5
    assert (drawn * columns).sum() / drawn.sum() == pytest.approx(60.3, abs=0.1)
    assert (drawn * rows).sum() / drawn.sum() == pytest.approx(58.9, abs=0.1)
    angle = np.linspace(0, 2 * np.pi, 721)
    assert (distance(shape, 1.01 * REACH[shape] * np.cos(angle), 1.01 * REACH[shape] * np.sin(angle)) > 0).all()
    inside = distance(shape, 0.97 * REACH[shape] * np.cos(angle), 0.97 * REACH[shape] * np.sin(angle))
    assert (inside < 0).any()
    with pytest.raises(ValueError, match="shape 'star'"):
        distance("star", 0.0, 0.0)


def test_masks_depth_and_edges(examples):
    for example in examples[:20]:
        picture, scene = example["picture"], example["scene"]
        mask = picture["mask"]
        assert set(np.unique(mask)) == set(range(len(scene.objects) + 1))
        for i, o in enumerate(scene.objects, start=1):
            pixels = picture["image"][mask == i]
            # The middle of an object has its colour.
            assert np.abs(np.median(pixels, axis=0) - COLOURS[o.colour]).max() <= 1
            np.testing.assert_allclose(picture["depth"][mask == i], o.depth, rtol=1e-6)
            assert (mask == i).sum() == pytest.approx(np.pi * (32 * o.radius) ** 2, rel=0.25)
        assert (picture["depth"][mask == 0] == 1).all()
        for y, x in np.argwhere(mask > 0):
            around = [mask[y + dy, x + dx] for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)) if 0 <= y + dy < 32 > x + dx >= 0]
            assert picture["edges"][y, x] == any(other != mask[y, x] for other in around)
        assert not picture["edges"][mask == 0].any()


def test_any_size(examples):
    """A scene drawn larger is the same scene: averaged down it is the smaller picture."""
    scene = examples[5]["scene"]
    large = render(scene, 128, 128)["image"].astype(float)
    small = render(scene, 32, 32)["image"]
    assert np.abs(large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3)) - small).max() < 40
    assert perceive(render(scene, 200, 200)["image"]).objects[0].shape == scene.objects[0].shape
    wide = World(WorldConfig(height=32, width=56, most=3))
    for i in range(20):
        example = wide.example(i)
        assert example["picture"]["image"].shape == (32, 56, 3)
        assert check(example["description"], example["picture"]["image"])


SCENE = Scene(
    "black",
    (
        Object("circle", "red", 0.2, 0.2, 0.18),
        Object("circle", "red", 0.8, 0.2, 0.11),
        Object("cross", "blue", 0.5, 0.8, 0.1),
    ),
)


@pytest.mark.parametrize(
    "text, truth",
    [
        ("three objects", True),
        ("two objects", False),
        ("two red circles", True),
        ("one large red circle; one small red circle", True),
        ("one red circle", False),
        ("no crosses", False),
        ("no green objects; no squares", True),
        ("one cross", True),
        ("a red circle at the top left", True),
        ("a large circle at the top right", False),
        ("a cross at the bottom", True),
        ("an object in the centre", False),
        ("a cross below a circle", True),
        ("a cross above a circle", False),
        ("a blue cross right of a red circle", True),
        ("a large red circle right of a circle", False),
        ("a circle left of a circle", True),
        ("a black background", True),
        ("three objects; a white background", False),
    ],
)
def test_what_statements_mean(text, truth):
    """Of a scene with a large red circle at the top left, a small one at the top right and a small blue cross below."""
    caption = parse(text)
    assert str(caption) == text and caption.holds(SCENE) is truth
    assert check(text, render(SCENE, 32, 32)["image"]) is truth


@pytest.mark.parametrize(
    "text",
    ["", "a", "red circle", "two circle", "one circles", "seven circles", "a object", "an red circle", "a red pentagon",
     "a circle at the middle", "a circle near a square", "a red background", "a red large circle", "two crosss"],
)  # fmt: skip
def test_sentences_outside_the_grammar(text):
    with pytest.raises(ValueError, match="not a statement of the world's grammar"):
        parse(text)


def test_every_statement_is_read_back():
    things = [Thing(*t) for t in itertools.product((None, *SHAPES), (None, "red", "purple"), (None, *SIZES))]
    statements = [Count(n, thing) for n in range(7) for thing in things]
    statements += [Place(thing, where) for thing in things for where in PLACES] + [Backdrop(name) for name in BACKGROUNDS]
    statements += [Relation(a, r, b) for a, r, b in zip(things, itertools.cycle(("left of", "above", "below")), reversed(things))]
    for statement in statements:
        assert parse(str(statement)) == Caption((statement,))
    assert len(set(map(str, statements))) == len(statements)


def test_captions_are_true_and_descriptions_complete(examples):
    kinds = set()
    for example in examples:
        scene, caption, description = example["scene"], example["caption"], example["description"]
        assert caption.holds(scene) and description.holds(scene)
        assert caption_score(description, example["picture"]["image"]) == 1
        assert parse(str(caption)) == caption and parse(str(description)) == description
        kinds |= {type(statement) for statement in caption.statements}
        # A description fits no other scene.
        assert not any(description.holds(other["scene"]) for other in examples if other is not example)
        assert Count(len(scene.objects)) in description.statements
    assert kinds == {Count, Place, Relation, Backdrop}
    assert place_of(Object("circle", "red", 0.9, 0.1, 0.1)) == "at the top right"
    long = say(examples[0]["scene"], np.random.default_rng(0), most=8)
    assert len(long.statements) > 3


@pytest.mark.parametrize("height, width", [(16, 16), (24, 24), (32, 32), (32, 48), (64, 64), (150, 150)])
def test_the_oracle_is_right_on_its_own_pictures(height, width):
    world = World(WorldConfig(height=height, width=width, most=4), "test")
    for i in range(10 if height > 64 else 40):
        example = world.example(i)
        image = example["picture"]["image"]
        assert check(example["description"], image) and check(str(example["caption"]), image), (i, str(example["description"]))
        seen = perceive(image)
        for true, found in zip(example["scene"].objects, seen.objects):
            assert np.hypot(true.x - found.x, true.y - found.y) < 0.03
        # As floats in [-1, 1], too.
        again = perceive(image / 127.5 - 1)
        assert [(o.shape, o.colour, o.size) for o in again.objects] == [(o.shape, o.colour, o.size) for o in seen.objects]


def test_the_oracle_notices_what_is_wrong(examples):
    """Each corruption of every picture makes the description false, and the score less than 1."""
    rng = np.random.default_rng(0)

    def verdicts(scene, example):
        image = render(scene, 32, 32)["image"]
        return check(example["description"], image), caption_score(example["description"], image)

    counted = {}
    for example in examples:
        scene = example["scene"]
        k = rng.integers(len(scene.objects))
        thing, rest = scene.objects[k], scene.objects[:k] + scene.objects[k + 1 :]

        def changed(thing=thing, rest=rest, **fields):
            return Scene(scene.background, (*rest, dataclasses.replace(thing, **fields)))  # noqa: B023

        cases = {
            "recoloured": changed(colour=rng.choice([c for c in COLOURS if c != thing.colour])),
            "swapped": changed(shape=rng.choice([s for s in SHAPES if s != thing.shape])),
            "resized": changed(radius=0.105 if thing.size == "large" else 0.18),
            "removed": Scene(scene.background, rest),
            "other background": Scene("white" if scene.background == "black" else "black", scene.objects),
        }
        for _ in range(30):  # a free place for one more, and another cell for this one
            more = draw_scene(WorldConfig(), rng).objects[0]
            free = all(np.hypot(o.x - more.x, o.y - more.y) > 1.6 * (o.radius + more.radius) for o in scene.objects)
            if free:
                cases["added"] = Scene(scene.background, (*scene.objects, more))
            if free and place_of(more) not in [place_of(o) for o in scene.objects]:
                cases["moved"] = changed(x=more.x, y=more.y, radius=min(thing.radius, more.radius))
                break
        for name, wrong in cases.items():
            true, score = verdicts(wrong, example)
            counted.setdefault(name, []).append(true)
            assert score < 1
    assert {name: sum(values) for name, values in counted.items()} == dict.fromkeys(counted, 0)
    assert min(map(len, counted.values())) > 20 and len(counted) == 7
    noise = [rng.integers(0, 256, (32, 32, 3)).astype(np.uint8) for _ in examples]
    assert not any(check(example["description"], image) for example, image in zip(examples, noise))


def blurred(image, sigma):
    """Gaussian blur, by the definition."""
    x = np.arange(32)
    kernel = np.exp(-((x[:, None] - x) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum(axis=1, keepdims=True)
    return np.einsum("yY,xX,YXc->yxc", kernel, kernel, image.astype(float))


def test_how_much_the_oracle_bears(examples):
    """The share of descriptions that are still found true; measured, so that it is known where trust ends."""
    rng, some = np.random.default_rng(1), examples[:30]

    def share(corrupt):
        images = [np.clip(corrupt(example["picture"]["image"].astype(float)), 0, 255).astype(np.uint8) for example in some]
        return np.mean([check(example["description"], image) for example, image in zip(some, images)])

    def noisy(sigma):
        return lambda image: image + sigma * rng.standard_normal(image.shape)

    assert share(lambda image: blurred(image, 0.6)) == 1
    assert share(noisy(20)) == 1
    assert share(lambda image: noisy(15)(blurred(image, 0.6))) == 1
    assert share(lambda image: 0.8 * image + 25) == 1  # paler
    assert share(noisy(90)) < 0.2
    assert share(lambda image: blurred(image, 3)) < 0.2


def test_attributes_are_asked_for_one_by_one():
    scene = Scene("black", (Object("circle", "red", 0.5, 0.5, 0.18), Object("cross", "blue", 0.1, 0.1, 0.1)))
    cases = {
        "one red circle": dict(count=1, shape=1, colour=1),
        "two red circles": dict(count=0, shape=1, colour=1),
        # Both are there, though not of one thing.
        "a red cross in the centre": dict(place=0, shape=1, colour=1),
        "a large green circle left of a small blue object": dict(relation=0, size=1, shape=1, colour=0.5),
        "no crosses; a white background": dict(count=0, background=0),
        "a cross at the top left; a black background": dict(place=1, shape=1, background=1),
        "a circle at the top left": dict(place=0, shape=1),
    }
    for caption, want in cases.items():
        assert attribute_scores(caption, scene) == want, caption


def test_class_scores():
    world = World(WorldConfig(height=24, width=24))
    examples = [world[i] for i in range(40)]
    images, labels = np.stack([e["image"] for e in examples]), np.array([e["label"] for e in examples])
    right = class_score(images, labels)
    assert right.shape == (40,) and right.min() > 0.9 and right.max() <= 1
    assert CLASSES[labels[0]] == f"{world.example(0)['scene'].objects[0].colour} {world.example(0)['scene'].objects[0].shape}"
    colour, shape = np.divmod(labels, len(SHAPES))
    other_colour = (colour + 1) % len(COLOURS) * len(SHAPES) + shape
    other_shape = colour * len(SHAPES) + (shape + 1) % len(SHAPES)
    np.testing.assert_allclose(class_score(images, other_colour), right - 1 / 3, atol=1e-6)
    wrong = class_score(images, other_shape)
    assert (wrong < right - 0.03).all() and (wrong > 2 / 3 - 1e-6).all()
    blank = np.full((1, 24, 24, 3), 20, np.uint8)
    assert class_score(blank, labels[:1]) == 0 and find_blobs(blank[0])[1] == []
    two = render(SCENE, 32, 32)["image"][None]
    assert 0.6 < class_score(two, np.array([CLASSES.index("red circle")]))[0] <= 2 / 3
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    assert class_score(noise, labels[:20]).mean() < 0.25
    assert np.isnan(class_score(np.full((1, 24, 24, 3), np.nan), labels[:1])).all()


def test_bad_input():
    sizes = (("height", 8), ("width", 0), ("fewest", 0), ("most", 9), ("size", 3), ("seed", -1))
    for field, value in (*sizes, ("backgrounds", ("pink",))):
        with pytest.raises(ValueError, match=f"world.{field}"):
            WorldConfig(**{field: value})
    with pytest.raises(ValueError, match="world.most=2: expected 3"):
        WorldConfig(fewest=3, most=2)
    with pytest.raises(ValueError, match=r"image \(32, 32, 1\): expected \[H, W, 3\]"):
        perceive(np.zeros((32, 32, 1), np.uint8))
    with pytest.raises(ValueError, match="2 images and 1 labels"):
        class_score(np.zeros((2, 32, 32, 3), np.uint8), np.zeros(1, int))
    with pytest.raises(ValueError, match="labels 30 to 30: expected 0 to 29"):
        class_score(np.zeros((1, 32, 32, 3), np.uint8), np.array([30]))
    with pytest.raises(ValueError, match="grammar"):
        check("a nice picture", np.zeros((32, 32, 3), np.uint8))


def test_the_world_is_a_data_source():
    config = DataConfig(path="world", image_size=16)
    assert info(config) == dict(num_classes=30, class_names=CLASSES, image_shape=(16, 16, 3), n_train=50_000, n_test=5_000)
    assert make_source(DataConfig(path="world"), "test")[0]["image"].shape == (32, 32, 3)
    assert config_lib.from_json(config_lib.to_json(config)) == config
    batch = next(iter(batches(make_source(config, "train"), config, batch_size=6, train=True)))
    assert batch["image"].shape == (6, 16, 16, 3) and batch["label"].dtype == np.int32
    # Pictures come through unchanged: the oracle finds each label.
    assert class_score(batch["image"], batch["label"]).min() > 0.9
    small = World(WorldConfig(size=20))
    assert len(small) == 20 and len(dataclasses.replace(small, split="test")) == 2
    assert {World(WorldConfig(backgrounds=("white",))).example(i)["scene"].background for i in range(9)} == {"white"}
    fewest = [len(World(WorldConfig(fewest=3, most=3)).example(i)["scene"].objects) for i in range(9)]
    assert fewest == [3] * 9
