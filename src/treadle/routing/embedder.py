"""Embedders: texts -> L2-normalised float32 vectors, whole or as they grow token by token.

The static embedder follows a running text by a sum of word vectors (`treadle.routing.running_sum`). The sentence
embedder (`treadle.routing.sentence_embedder`) reads the text anew for each decision.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from treadle.common.documents import check_text, read_object
from treadle.common.errors import BundleError, ModelError, OptionError, problem_list, reason_of
from treadle.routing.embedder_files import PROBES, check_folder, is_foreign_fault, table_problems
from treadle.routing.running_sum import WORD, PieceEffects, RunningSum, Sums, Tails
from treadle.routing.sentence_embedder import SentenceEmbedder

if TYPE_CHECKING:
    from model2vec import StaticModel

Floats = NDArray[np.float32]

MAX_CACHED_WORDS = 20_000
WORDS_AT_ONCE = 4096
"""The most words that are summed at once, so that one long text does not fill the cache."""


TAIL_WORDS = (24, 8)
"""The tails of a text that a router compares beside the whole, in words; chosen on validation rows."""


class Embedder(Protocol):
    """Turns texts into unit vectors; `id` tells embedders apart, whose vectors mean nothing to each other."""

    @property
    def id(self) -> str:
        """Name and, for a folder, content."""
        ...

    @property
    def dim(self) -> int:
        """D, the length of a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> Floats:
        """Return the vectors (B, D) of whole texts; a text without words has the vector 0."""
        ...

    @property
    def tails(self) -> Tails:
        """The tails that a new router compares beside whole texts."""
        ...

    def follow(self, tails: Tails, window: int | None = None) -> RunningSum | None:
        """Return the running sum of an empty text, whose whole is its last `window` tokens; None = it keeps none."""
        ...

    def views(self, text: str, tails: Tails) -> Sequence[Any]:
        """Return the K views of a text, for `finish`: the whole, then its tails."""
        ...

    def finish(self, views: Sequence[Any]) -> Floats:
        """Return the vectors (B, D) of views."""
        ...

    def save(self, folder: Path) -> str:
        """Write what a bundle needs to `folder` and return what its `embedder` field says."""
        ...


class StaticEmbedder:
    """A model2vec model: a text's vector is the sum of its tokens' vectors, normalised.

    Texts are cut into words (`WORD`) that are tokenised one by one, so that a running text can be summed up word by
    word; word-piece tokenizers cut there themselves (but for symbols glued to a word, as in `465°C`). Nothing is ever
    truncated.
    """

    tails: Tails = TAIL_WORDS

    def __init__(self, model: "StaticModel", max_cached_words: int = MAX_CACHED_WORDS) -> None:
        self.model = model
        self._max_cached_words = max_cached_words
        self._check: Callable[[], None] | None = None
        self._sums: dict[str, Sums] = {}  # of each word's vectors; never written to
        digest = hashlib.sha256(np.ascontiguousarray(model.embedding).tobytes())
        for extra in (model.weights, model.token_mapping):
            digest.update(b"" if extra is None else np.ascontiguousarray(extra).tobytes())
        digest.update("\n".join(model.tokens).encode())
        self.id = f"static:{digest.hexdigest()[:16]}"
        self.dim: int = model.dim
        self.effects = PieceEffects(self)

    def attended(self, check: Callable[[], None]) -> "StaticEmbedder":
        """Return this embedder with its own cache of words; it calls `check` now and then during a long text."""
        made = copy(self)
        made._sums, made._check, made.effects = {}, check, PieceEffects(made)
        return made

    @classmethod
    def load(cls, name: str | Path) -> "StaticEmbedder":
        """Load a model2vec folder or hub id."""
        from model2vec import StaticModel

        if os.path.isdir(name):
            check_folder(Path(name))
        try:
            model = StaticModel.from_pretrained(name)
            model.tokenize(PROBES)
        except BaseException as error:
            if not is_foreign_fault(error):
                raise
            raise ModelError(f"static embedder {str(name)!r} cannot be loaded: {reason_of(error)}") from error
        if problems := table_problems(model):
            raise ModelError(problem_list(f"static embedder {str(name)!r} cannot be used:", problems))
        return cls(model)

    def encode(self, texts: Sequence[str]) -> Floats:
        """Return the vectors (B, D) of whole texts."""
        for text in texts:
            check_text(text)
        return self.finish([self.sum_words(WORD.findall(text)) for text in texts])

    def follow(self, tails: Tails, window: int | None = None) -> RunningSum:
        """Return the running sum of an empty text, whose whole is its last `window` tokens."""
        return RunningSum(self.effects, tails, window)

    def views(self, text: str, tails: Tails) -> list[Sums]:
        """Return the sums (D,) of all words of a text and of its tails."""
        words = WORD.findall(text)
        return [self.sum_words(words), *(self.sum_words(words[-count:]) for count in tails)]

    def finish(self, views: Sequence[Sums]) -> Floats:
        """Return sums of word vectors, normalised: (B, D)."""
        if not len(views):
            return np.zeros((0, self.dim), np.float32)
        return self.unit(np.concatenate(views).reshape(-1, self.dim))

    def unit(self, sums: Sums) -> Floats:
        """Return sums of word vectors (B, D), normalised."""
        norms = np.sqrt(np.einsum("bd,bd->b", sums, sums))[:, None]  # a quarter of the time of np.linalg.norm
        return (sums / np.maximum(norms, 1e-12)).astype(np.float32)

    def save(self, folder: Path) -> str:
        """Write the model to `folder`/embedder."""
        self.model.save_pretrained(folder / "embedder")
        (folder / "embedder" / "README.md").unlink(missing_ok=True)  # model2vec's card of a model on the hub
        return "embedder"

    def sum_words(self, words: Sequence[str]) -> Sums:
        """Return the sum (D,) of the vectors of all tokens of some words; not to be written to."""
        sums = self._sums
        if len(words) == 1 and words[0] in sums:  # almost every token of a running text
            return sums[words[0]]
        total = np.zeros(self.dim)
        for start in range(0, len(words), WORDS_AT_ONCE):
            total += self._sum_some(words[start : start + WORDS_AT_ONCE])
        return total

    def _sum_some(self, words: Sequence[str]) -> Sums:
        """Return the sum (D,) of the vectors of at most WORDS_AT_ONCE words."""
        if self._check is not None:
            self._check()
        sums = self._sums
        if new := [word for word in dict.fromkeys(words) if word not in sums]:
            if len(sums) + len(new) > self._max_cached_words:
                sums = self._sums = {}  # not emptied: another thread may be reading
                new = list(dict.fromkeys(words))
            sums.update(zip(new, map(self._sum_tokens, self.model.tokenize(new)), strict=True))
        total = np.zeros(self.dim)
        for word in words:
            total += sums[word]
        return total

    def _sum_tokens(self, ids: Sequence[int]) -> Sums:
        """Return the sum (D,) of the vectors of one word's tokens; model2vec has left out unknown ones."""
        mapping, weights = self.model.token_mapping, self.model.weights
        vectors = self.model.embedding[list(ids) if mapping is None else mapping[list(ids)]].astype(np.float32)
        if weights is not None:
            vectors = vectors * weights[list(ids), None]
        return vectors.sum(0, dtype=np.float32).astype(np.float64)


def encode_views(embedder: Embedder, texts: Sequence[str], tails: Tails) -> Floats:
    """Return the vectors (B, K, D) of whole texts and their tails."""
    for text in texts:
        check_text(text)
    views = [view for text in texts for view in embedder.views(text, tails)]
    return embedder.finish(views).reshape(len(texts), 1 + len(tails), embedder.dim)


def load_embedder(name: str | Path) -> Embedder:
    """Load an embedder: a model2vec folder, a sentence-transformers folder, or the hub id of one of these.

    `static:NAME` names a model2vec model on the hub; every other hub id is a sentence-transformers model.
    """
    text = str(name)
    if text.startswith("static:"):
        return StaticEmbedder.load(text.removeprefix("static:"))
    folder = Path(name)
    if not os.path.isdir(folder):
        if text.startswith((".", "/", "~")):
            raise OptionError(f"embedder {text!r}: no such folder.")
        return SentenceEmbedder(text)
    config = read_object(folder / "config.json", BundleError)
    # model2vec names its kind only in what it has distilled; every config of transformers names one
    is_static = config.get("model_type", "model2vec") == "model2vec"
    return StaticEmbedder.load(folder) if is_static else SentenceEmbedder(text)
