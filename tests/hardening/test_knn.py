from __future__ import annotations

import numpy as np

from hardening.knn import knn_predict


def test_neighbours_by_angle_not_by_length() -> None:
    gallery = np.array([[1, 0], [1, 0.1], [0, 100.0], [0, 90]])
    assert knn_predict(gallery, [0, 0, 1, 1], [[50, 1], [0.1, 1]], 2).tolist() == [0, 1]


def test_the_majority_of_the_neighbours_decides() -> None:
    gallery = np.array([[1, 0], [1, 0.2], [1, 0.3], [0, 1]])
    labels = [7, 3, 3, 3]
    assert knn_predict(gallery, labels, [[1, 0]], 1).tolist() == [7]
    assert knn_predict(gallery, labels, [[1, 0]], 3).tolist() == [3]


def test_more_neighbours_than_there_are() -> None:
    assert knn_predict(np.eye(3), [0, 0, 1], [[1, 0, 0]], 20).tolist() == [0]
