import numpy as np
import pytest

from datasets.cityscapes import Cityscapes
from datasets.drawn.scene import CLASSES, draw_scene

NAMES = {c.id: name for name, c in CLASSES.items()}


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(np.random.default_rng([5, i]), 128) for i in range(24)]


def test_shapes_and_types(scenes):
    for scene in scenes:
        assert scene.image.shape == (128, 256, 3) and scene.image.dtype == np.uint8
        assert scene.label_ids.shape == (128, 256) and scene.label_ids.dtype == np.uint8
        assert scene.instance_ids.shape == (128, 256) and scene.instance_ids.dtype == np.uint16


def test_all_19_classes_appear(scenes):
    seen, table = set(), Cityscapes.CLASSES.to_train_ids()
    for scene in scenes:
        seen |= set(table[np.unique(scene.label_ids)].tolist())
    assert seen == {*range(19), 255}


def test_instances_belong_to_their_class(scenes):
    for scene in scenes:
        for instance in np.unique(scene.instance_ids):
            label_id = np.unique(scene.label_ids[scene.instance_ids == instance])
            assert len(label_id) == 1
            if CLASSES[NAMES[label_id[0]]].has_instances:
                assert instance // 1000 == label_id[0]
            else:
                assert instance == label_id[0]


def test_instances_of_a_class_are_told_apart(scenes):
    cars = [len(np.unique(s.instance_ids[s.instance_ids // 1000 == 26])) for s in scenes]
    assert max(cars) >= 3


def test_the_generator_decides(scenes):
    again = draw_scene(np.random.default_rng([5, 3]), 128)
    assert np.array_equal(again.image, scenes[3].image)
    assert not np.array_equal(scenes[4].image, scenes[3].image)


def test_scenes_vary_in_light_and_layout(scenes):
    brightness = [scene.image.mean() for scene in scenes]
    assert max(brightness) > 1.4 * min(brightness)
    sky = [(scene.label_ids == 23).mean() for scene in scenes]
    assert max(sky) > 1.5 * min(sky)
