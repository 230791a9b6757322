"""The plain model behind a folder of another kind: how it is named there, and found again."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from unlearn import models
from unlearn.errors import UserError
from unlearn.kinds import kind_of


@dataclass(frozen=True)
class Base:
    """A plain model, with the hashes that it had when something was made for it."""

    source: models.ModelSource
    weights_sha256: str
    tokenizer_sha256: str

    @classmethod
    def named(cls, content: Mapping[str, Any], folder: models.ModelSource) -> "Base":
        """Read it from the JSON file of a folder; it is loaded in the same way as the folder."""
        source = replace(folder, path=content["base_model"], revision=content["base_revision"])
        hashes = (str(content[name]) for name in ("base_weights_sha256", "tokenizer_sha256"))
        return cls(source, *hashes)

    def at(self, path: str | None) -> "Base":
        """Give the same base at another place; None leaves it where it is."""
        if path is None:
            return self
        return replace(self, source=replace(self.source, path=path, revision=None))

    def loaded(self, folder: str, file: str, *, device: str | None = None) -> Any:
        """Load it, and refuse it if it is not what it was.

        Raises:
            UserError: it is missing, or has other weights or another tokenizer.
        """
        found = models.load_model(self.source, device=device)
        self.require_same(folder, file)
        return found

    def check(self, folder: str, file: str) -> None:
        """Refuse a base that is not there, or no plain model; reads no weights.

        Raises:
            UserError: names the folder, and the ``file`` in it that names the base.
        """
        try:
            models.check_source(self.source)
        except UserError as error:
            hint = f"set base_model in {Path(folder) / file} to where it is now"
            raise UserError(f"'{folder}' needs its base: {error.message}", hint) from error
        if kind_of(self.source):
            raise UserError(f"the base of '{folder}', '{self.source.path}', is no plain model")

    def require_same(self, folder: str, file: str) -> None:
        """Refuse a base that has other weights or another tokenizer than it had.

        Raises:
            UserError: says which of the two.
        """
        path = self.source.path
        if weights_sha256(self.source) != self.weights_sha256:
            raise UserError(
                f"'{path}' does not hold the weights that '{folder}' was made for",
                f"set base_model in {Path(folder) / file} to the model it was made from",
            )
        tokenizer = models.load_tokenizer(self.source)
        if models.tokenizer_sha256(tokenizer) != self.tokenizer_sha256:
            raise UserError(
                f"the tokenizer of '{path}' is not the one that '{folder}' was made with",
                "restore the base's tokenizer files",
            )


def source_of(folder: models.ModelSource | str | Path, dtype: models.Dtype) -> models.ModelSource:
    """Give a folder as a source: in this precision, where it is given by its path alone."""
    if isinstance(folder, models.ModelSource):
        return folder
    return models.ModelSource(str(folder), dtype=dtype)


def recorded(base: models.ModelSource, tokenizer: Any) -> dict[str, Any]:
    """Say in JSON which base something is made for; :meth:`Base.named` reads it."""
    local = Path(base.path)
    return {
        "base_model": str(local.absolute()) if local.exists() else base.path,
        "base_revision": base.revision,
        "base_weights_sha256": weights_sha256(base),
        "tokenizer_sha256": models.tokenizer_sha256(tokenizer),
    }


def weights_sha256(source: models.ModelSource) -> str:
    """Hash a model's weight files, whatever precision they are loaded in."""
    digest = hashlib.sha256()
    for path in _weight_files(source):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _weight_files(source: models.ModelSource) -> list[Path]:
    """List the weight files of a plain model that is here: in a folder, or downloaded."""
    folder = source.path
    if not Path(folder).exists():
        folder = snapshot_download(folder, revision=source.revision, local_files_only=True)
    return sorted(Path(folder).glob("*.safetensors"))


@contextmanager
def content_of(path: Path, newest: int) -> Iterator[dict[str, Any]]:
    """Give the content of a folder's JSON file; what cannot be made of it is damage.

    Raises:
        UserError: the file is damaged, or of a format later than ``newest``.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] > newest:
            raise UserError(f"'{path}' was written by a later version", "update unlearn")
        yield found
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"'{path}' is damaged: {error!r}", "copy the folder again") from error
