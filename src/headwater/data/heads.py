"""How many heads a corpus asks for: HydraLoRA's recipe (arXiv 2404.19245): TF-IDF, k-means, elbow."""

from __future__ import annotations

from collections.abc import Sequence

from headwater.errors import HeadwaterError, Problem


def suggest_num_heads(texts: Sequence[str], k_max: int = 10, *, seed: int = 0) -> int:
    """Number of clusters at the elbow of k-means' error curve over TF-IDF vectors; a starting point, not a verdict.

    The elbow is the number of clusters whose squared error lies farthest below the straight line from one cluster to
    `k_max`; without any bend, 1.

    Args:
        texts: training texts, say prompts and completions of all tasks; a few thousand tell enough.
        k_max: most clusters to try, at least 3.
        seed: of the starts of k-means.

    Raises:
        HeadwaterError: scikit-learn is not installed, or there are too few different texts.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise HeadwaterError(
            Problem("suggest_num_heads needs scikit-learn", fix="pip install 'headwater[heads]'")
        ) from error
    if k_max < 3:
        raise HeadwaterError(Problem(f"k_max is {k_max}; an elbow needs 3 or more"))
    if len(set(texts)) < k_max:
        raise HeadwaterError(Problem(f"{len(set(texts))} different texts do not make {k_max} clusters"))
    try:
        vectors = TfidfVectorizer(stop_words="english", max_features=20_000, sublinear_tf=True).fit_transform(texts)
    except ValueError as error:
        raise HeadwaterError(Problem("the texts hold no words to tell them apart by")) from error
    errors = [KMeans(k, n_init=4, random_state=seed).fit(vectors).inertia_ for k in range(1, k_max + 1)]
    return elbow(errors)


def elbow(errors: Sequence[float]) -> int:
    """Which k = 1, 2, ... has its error farthest below the line from the first to the last; 1 if none lies below."""
    first, last = errors[0], errors[-1]
    steps = len(errors) - 1
    below = [first + (last - first) * i / steps - error for i, error in enumerate(errors)]
    return max(range(len(errors)), key=lambda i: below[i]) + 1 if max(below) > 1e-12 * abs(first) else 1
