"""Checks an export while it streams by: every byte is known to be the sender's before weights are handed on.

Guarantee: a member's bytes are returned only after their digest was compared with the signed manifest; weights, which
are handed on in pieces, only count when the iterator has ended without an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from tg_tinker.errors import LogVerificationError
from tg_tinker.exports.errors import refused
from tg_tinker.exports.manifest import PEFT, Manifest, claimed_origin, open_manifest
from tg_tinker.exports.model_signing import check_bundle
from tg_tinker.exports.tar import (
    ADAPTER,
    ADAPTER_CONFIG,
    BUNDLE,
    BUNDLE_KEY,
    CARD,
    LARGEST_BYTES,
    MANIFEST,
    WEIGHT_FILES,
    WEIGHTS,
    Bytes,
    TarReader,
)
from tg_tinker.transparency.note import VerifierKey

Trust = VerifierKey | Callable[[str], VerifierKey]
"""The key that must have signed, or what finds the key that is trusted for the origin that an export claims."""


class ExportReader:
    """An export up to its weights, verified; `weights` gives the rest.

    Attributes:
        key: that signed it.
        files: content of every file but the weights, by name.
        weights_name, weights_bytes: of the file of weights.

    Raises:
        InvalidRequestError: not an export, or altered.
        LogVerificationError: not signed by the key that is trusted.
    """

    def __init__(
        self, archive: Iterable[Bytes], key: Trust, *, largest_bytes: Mapping[str, int] = LARGEST_BYTES
    ) -> None:
        """Read up to the weights; a file over ``largest_bytes`` is refused before any of it is read."""
        self._tar = TarReader(archive)
        found = self._tar.next_member()
        if found is None or found[0] != MANIFEST:
            raise refused("it does not begin with a manifest")
        envelope = b"".join(self._tar.content())
        self.key = key if isinstance(key, VerifierKey) else key(claimed_origin(envelope))
        self.manifest: Manifest = open_manifest(envelope, self.key)
        self.manifest_digest = hashlib.sha256(envelope).hexdigest()
        self.files: dict[str, bytes] = {MANIFEST: envelope}
        found = self._tar.next_member()
        while found is not None and found[0] not in WEIGHT_FILES:
            name, size = found
            if size > largest_bytes.get(name, size):
                raise refused(
                    f"its {name} has {size:,} bytes, over the {largest_bytes[name]:,} that are taken here",
                    constraint=f"{name} of at most {largest_bytes[name]} bytes",
                )
            self.files[name] = content = b"".join(self._tar.content())
            if name != BUNDLE and hashlib.sha256(content).hexdigest() != self.manifest.files.get(name):
                raise refused(f"{name} is not the file that was signed")
            found = self._tar.next_member()
        if found is None:
            raise refused("it has no weights")
        self.weights_name, self.weights_bytes = found
        self._check_complete()

    @property
    def folder(self) -> str:
        """The folder its files unpack into: the artifact's id where it was made."""
        return self._tar.folder

    def weights(self) -> Iterator[bytes]:
        """The file of weights, in pieces.

        Raises:
            InvalidRequestError: at the end, that it was not the file that was signed: use nothing of it.
        """
        digest = hashlib.sha256()
        for piece in self._tar.content():
            digest.update(piece)
            yield piece
        if digest.hexdigest() != self.manifest.files[self.weights_name]:
            raise refused(f"{self.weights_name} is not the file that was signed")
        if self._tar.next_member() is not None:
            raise refused("files follow its weights")

    def _check_complete(self) -> None:
        is_adapter = self.manifest.predicate["layout"] == PEFT
        listed = set(self.manifest.files)
        present = {*self.files, self.weights_name} - {MANIFEST, BUNDLE}
        needed = {CARD, BUNDLE_KEY, *((ADAPTER, ADAPTER_CONFIG) if is_adapter else (WEIGHTS,))}
        if listed != present or not needed <= present or BUNDLE not in self.files:
            raise refused("its files are not those of its manifest")
        if self.folder != self.manifest.predicate["artifact"]["id"]:
            raise LogVerificationError("the export's folder is not named after its artifact", kind="bad_signature")
        digests = {**self.manifest.files, MANIFEST: self.manifest_digest}
        check_bundle(self.files[BUNDLE], self.folder, digests, self.files[BUNDLE_KEY])
