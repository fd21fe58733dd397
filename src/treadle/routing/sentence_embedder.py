"""The paper's embedder, a sentence-transformers model: it reads a running text anew whenever it is asked.

A text's cost grows with its length, so texts are cut to their last pieces and batched with texts of like lengths.
"""

import hashlib
import logging
import os
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from treadle.common.documents import check_text
from treadle.common.errors import ModelError, reason_of
from treadle.common.files import cached_folder
from treadle.routing.embedder_files import PROBES, check_folder, is_foreign_fault
from treadle.routing.running_sum import Tails

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]
logger = logging.getLogger(__name__)

DEFAULT_SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The paper's embedder."""
PIECE_CHARS = 16
"""Characters that a word piece rarely exceeds; the last pieces of a long text are looked for by it."""
SPACE = re.compile(r"\s")
WORDS = re.compile(r"\S+\s*")
"""A word and the space after it."""
MAX_WORD_CHARS = 64
"""Longer words count as several."""


class SentenceEmbedder:
    """A sentence-transformers model. It reads a bounded number of word pieces: of a longer text, the *last* ones."""

    tails: Tails = (24,)

    def __init__(self, name: str = DEFAULT_SENTENCE_MODEL, device: "str | torch.device | None" = None) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ModelError("the sentence embedder needs: pip install 'treadle[sentence]'") from error

        local = Path(name) if os.path.isdir(name) else cached_folder(name)
        is_local = os.path.isdir(local)
        if is_local:
            check_folder(local)
        try:
            self.model = SentenceTransformer(
                str(local) if is_local else name,
                device=None if device is None else str(device),
                model_kwargs={"use_safetensors": True},  # pytorch_model.bin is a pickle
                trust_remote_code=False,
                local_files_only=is_local,  # a folder names nothing that is fetched
            )
            self.model.encode(list(PROBES[:1]), show_progress_bar=False)
        except BaseException as error:
            if not is_foreign_fault(error):
                raise
            raise ModelError(
                f"sentence embedder {name!r} cannot be loaded: {reason_of(error)}\n"
                f"  What to do: name a folder that holds it, put it into {cached_folder(name)}, or go online."
            ) from error
        self.name = name
        self.id = f"sentence:{_fingerprint(self.model.state_dict())}"
        self.dim: int = int(self.model.get_embedding_dimension() or 0)
        self._said = False
        self._turn = threading.Lock()  # threads share the tokenizer, whose truncation each call sets

    def encode(self, texts: Sequence[str]) -> Floats:
        """Return the vectors (B, D) of whole texts, of long ones of their last pieces; any thread may call it."""
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        for text in texts:
            check_text(text)
        vectors = np.empty((len(texts), self.dim), np.float32)
        with self._turn:
            cut, sizes = zip(*map(self._last_pieces, texts), strict=True)
            for places in _alike(sizes):
                group = [cut[place] for place in places]
                vectors[places] = self.model.encode(group, normalize_embeddings=True, show_progress_bar=False)
        return vectors

    def follow(self, tails: Tails, window: int | None = None) -> None:
        """Keep no sum: each text is read anew."""

    def views(self, text: str, tails: Tails) -> list[str]:
        """Return a text and its tails, each to be read anew."""
        return [text, *(last_words(text, count) for count in tails)]

    def finish(self, views: Sequence[str]) -> Floats:
        """Return the vectors (B, D) of running texts, encoded in one batch."""
        return self.encode(views)

    def save(self, folder: Path) -> str:
        """Return the model's hub id; a model that lies in a folder is copied to `folder`/embedder."""
        if not Path(self.name).is_dir():
            return self.name
        self.model.save(str(folder / "embedder"), create_model_card=False)
        return "embedder"

    def _last_pieces(self, text: str) -> tuple[str, int]:
        """Return as much of the end of a text as the model reads, and how many pieces that is."""
        limit = int(self.model.max_seq_length or 256) - 2  # two pieces are the tokenizer's own
        tail = _from_a_word_on(text, len(text) - PIECE_CHARS * limit)
        offsets = self._offsets(tail)
        if len(offsets) < limit and len(tail) < len(text):
            tail, offsets = text, self._offsets(text)
        if len(offsets) <= limit and len(tail) == len(text):
            return text, len(offsets)
        if not self._said:
            logger.warning("%s reads %d word pieces; of longer texts it sees the last ones", self.name, limit)
            self._said = True
        return tail[offsets[-limit][0] :], limit

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        """Return where each piece of a text begins and ends."""
        given = self.model.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        return given["offset_mapping"]


def last_words(text: str, count: int) -> str:
    """Return the last words of a text."""
    end = text[-MAX_WORD_CHARS * count :] if len(text) > MAX_WORD_CHARS * count else text
    return "".join(WORDS.findall(end)[-count:])


def _from_a_word_on(text: str, place: int) -> str:
    """Return the text from the first space at or behind `place` on; all of it where there is none."""
    found = SPACE.search(text, place) if place > 0 else None
    return text[found.start() :] if found else text


def _alike(sizes: Sequence[int]) -> list[list[int]]:
    """Group texts by size, each at least half of the longest in its group, to limit padding."""
    groups: list[list[int]] = []
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        if groups and 2 * sizes[place] >= sizes[groups[-1][0]]:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _fingerprint(state: Mapping[str, Any]) -> str:
    """Return a short digest of the shapes and the first values of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
