"""k-nearest-neighbour accuracy: how good an embedding is, with nothing trained on it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier


def knn_predict(gallery: Any, labels: Any, queries: Any, neighbours: int = 20) -> NDArray[np.int64]:
    """Predict [n] classes of `queries` [n, d] from a labelled `gallery` [m, d] by cosine, neighbours weighted equally."""
    classifier = KNeighborsClassifier(n_neighbors=min(neighbours, len(gallery)), metric="cosine", algorithm="brute")
    classifier.fit(np.asarray(gallery), np.asarray(labels))
    return np.asarray(classifier.predict(np.asarray(queries)))
