import dataclasses

import numpy as np

from configs import jpeg_lm
from jaxgen.data import DataConfig
from jaxgen.recipes.byte_image_claims import rarest


def test_the_rarest_images_of_a_long_file_with_one_class_after_another(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 2000)
    images = (60 * labels[:, None, None] + rng.integers(0, 3, (6000, 8, 8))).astype(np.uint8)
    odd = np.array([7, 2500, 5999])
    images[odd] = 255
    test = dict(x_test=images[odd[0] : odd[0] + 30], y_test=labels[odd[0] : odd[0] + 30])
    np.savez(tmp_path / "sorted.npz", x_train=images, y_train=labels, **test)
    data = DataConfig(path=str(tmp_path / "sorted.npz"), channels=1)
    found = rarest(dataclasses.replace(jpeg_lm.build("smoke"), data=data))
    assert found.shape == (3, 8, 8, 1) and (found[0] == 1).all() and (found[1] != 1).any()
