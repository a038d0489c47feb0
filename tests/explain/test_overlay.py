"""Maps over pictures."""

import numpy as np
import pytest

from dense_shortcuts.experiments.explain.picture import overlay


def test_a_map_of_few_places_is_drawn_smooth():
    cam = np.zeros((8, 8), np.float32)
    cam[2:4, 2:4] = 1.0
    drawn = overlay(np.full((8, 8, 3), 128, np.uint8), cam).astype(int)
    assert drawn.shape == (336, 336, 3)
    assert 0 < np.abs(np.diff(drawn, axis=0)).max() < (drawn.max() - drawn.min()) / 3  # no edges where places end


def test_a_picture_that_is_large_enough_keeps_its_size():
    assert overlay(np.zeros((400, 400, 3), np.uint8), np.zeros((400, 400))).shape == (400, 400, 3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_the_scale_stay_where_they_are(value):
    drawn = overlay(np.zeros((16, 16, 3), np.uint8), np.full((16, 16), value))
    assert np.ptp(drawn.reshape(-1, 3).astype(int), axis=0).max() <= 4
