"""Every object key is built, read and checked here and nowhere else.

What always holds:

* A key is fresh: it ends in a random token, so no object is ever written over.
* Numbers are zero-padded, so that listing a prefix is listing in `seq` order.
* A key is plain: segments of `A-Z a-z 0-9 . _ = -` joined by `/`, none beginning with a dot. Every S3 server and
  every file system takes it as it is. Other characters in ids and names become `=` and the two hex digits of their
  UTF-8 bytes (`run:train:0` → `run=3Atrain=3A0`), so distinct names stay distinct and can be read back.
* No key continues another as a path: where `a/b` is an object, `a/b/c` is none.

    payloads/<owner>/<seq>-<token>.bin                 owner: training run or sampling session
    results/<2 hex>/<request>-<token>.bin              2 hex: spreads the files over directories
    snapshots/<run>/<seq>-<token>.safetensors
    checkpoints/<run>/<kind>/<name>/<token>/<file>     files of one checkpoint share a token
    base_models/<name>/<token>/<file>                  files of one base model share a token
    exports/<owner>/<token>/<file>
"""

import hashlib
import re
import secrets
from dataclasses import dataclass
from enum import StrEnum

from storage.errors import InvalidObjectKeyError

KEY_BYTES_MAX = 900  # S3 allows 1,024; the rest is left to a bucket's own path prefix
SEGMENT_BYTES_MAX = 240  # file systems allow 255
SEQ_DIGITS = 19  # those of a 64-bit integer: copies of a sampling client number their samples up to 10^18

_SEGMENT = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*", re.ASCII)
_PLAIN_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_ESCAPED = re.compile(r"=([0-9A-F]{2})")
_NUMBERED = re.compile(rf"(?P<seq>[0-9]{{{SEQ_DIGITS}}})-(?P<token>[0-9a-f]{{16}})\.(?:bin|safetensors)")
_RESULT = re.compile(r"(?P<request>.+)-(?P<token>[0-9a-f]{16})\.bin")
_TOKEN = re.compile(r"[0-9a-f]{16}")


class KeyKind(StrEnum):
    """What an object is; the first segment of its key."""

    PAYLOAD = "payloads"
    RESULT = "results"
    SNAPSHOT = "snapshots"
    CHECKPOINT = "checkpoints"
    BASE_MODEL = "base_models"
    EXPORT = "exports"


@dataclass(frozen=True, slots=True)
class ObjectKey:
    """A key taken apart by `parse`.

    Attributes:
        kind: what the object is.
        owner: training run, sampling session, request or base model that it belongs to, as it was named.
        token: 16 hex digits that make the key fresh.
        seq: of payloads and snapshots only.
        checkpoint_kind: of checkpoints only.
        name: of checkpoints only.
        filename: of checkpoints, base models and exports.
    """

    kind: KeyKind
    owner: str
    token: str
    seq: int | None = None
    checkpoint_kind: str | None = None
    name: str | None = None
    filename: str | None = None


def new_token() -> str:
    """Return 16 random hex digits; hand the same to each key of one set of files."""
    return secrets.token_hex(8)


def payload_key(owner_id: str, seq: int) -> str:
    """Return a fresh key for the payload of operation `seq` of a training run or sampling session."""
    return _checked(KeyKind.PAYLOAD, _escape(owner_id), f"{_padded(seq)}-{new_token()}.bin")


def result_key(request_id: str) -> str:
    """Return a fresh key for the result of an operation."""
    return _checked(KeyKind.RESULT, _spread(request_id), f"{_escape(request_id)}-{new_token()}.bin")


def snapshot_key(run_id: str, seq: int) -> str:
    """Return a fresh key for the state of a run after operation `seq`."""
    return _checked(KeyKind.SNAPSHOT, _escape(run_id), f"{_padded(seq)}-{new_token()}.safetensors")


def checkpoint_key(run_id: str, kind: str, name: str, filename: str, *, token: str | None = None) -> str:
    """Return a fresh key for one file of a checkpoint; `kind` tells training weights from sampler weights."""
    parts = (_escape(run_id), _escape(kind), _escape(name), token or new_token(), _escape(filename))
    return _checked(KeyKind.CHECKPOINT, *parts)


def base_model_key(name: str, filename: str, *, token: str | None = None) -> str:
    """Return a fresh key for one file of a base model."""
    return _checked(KeyKind.BASE_MODEL, _escape(name), token or new_token(), _escape(filename))


def export_key(owner_id: str, filename: str, *, token: str | None = None) -> str:
    """Return a fresh key for a file made for download."""
    return _checked(KeyKind.EXPORT, _escape(owner_id), token or new_token(), _escape(filename))


def prefix(kind: KeyKind, owner_id: str | None = None) -> str:
    """Return what all keys of a kind, or of one owner in it, begin with.

    Raises:
        ValueError: an owner is named for results, which lie spread and not by owner.
    """
    if owner_id is None:
        return f"{kind}/"
    if kind is KeyKind.RESULT:
        raise ValueError("results have no prefix by owner: look their keys up in the journal")
    return f"{kind}/{_escape(owner_id)}/"


def parse(key: str) -> ObjectKey:
    """Take a key apart; the inverse of the functions above.

    Raises:
        InvalidObjectKeyError: none of the functions above builds this key.
    """
    check_key(key)
    match key.split("/"):
        case ["payloads" | "snapshots" as kind, owner, last] if match := _NUMBERED.fullmatch(last):
            return ObjectKey(KeyKind(kind), _unescape(key, owner), match["token"], seq=int(match["seq"]))
        case ["results", _, last] if match := _RESULT.fullmatch(last):
            return ObjectKey(KeyKind.RESULT, _unescape(key, match["request"]), match["token"])
        case ["checkpoints", run, kind, name, token, file] if _TOKEN.fullmatch(token):
            run, kind, name, file = (_unescape(key, part) for part in (run, kind, name, file))
            return ObjectKey(KeyKind.CHECKPOINT, run, token, checkpoint_kind=kind, name=name, filename=file)
        case ["base_models" | "exports" as kind, owner, token, file] if _TOKEN.fullmatch(token):
            return ObjectKey(KeyKind(kind), _unescape(key, owner), token, filename=_unescape(key, file))
        case _:
            raise InvalidObjectKeyError(key, "it has the form of no kind of object in storage/keys.py")


def check_key(key: str) -> None:
    """Refuse what is not a plain key; every object store calls this first.

    Raises:
        InvalidObjectKeyError: empty, too long, or with a segment that is empty, begins with a dot or holds other
            characters than `A-Z a-z 0-9 . _ = -`.
    """
    if not key:
        raise InvalidObjectKeyError(key, "it is empty")
    if len(key) > KEY_BYTES_MAX:
        raise InvalidObjectKeyError(key, f"it has {len(key)} characters, the limit is {KEY_BYTES_MAX}")
    for segment in key.split("/"):
        _check_segment(key, segment)


def check_prefix(start: str) -> None:
    """Refuse what no key can begin with; the empty prefix is every key's.

    Raises:
        InvalidObjectKeyError: as `check_key`, but the last segment may be empty or unfinished.
    """
    if start:
        check_key(start.removesuffix("/"))


def _check_segment(key: str, segment: str) -> None:
    if len(segment) > SEGMENT_BYTES_MAX:
        reason = f"{segment[:40]}… has {len(segment)} characters, the limit is {SEGMENT_BYTES_MAX}; shorten the name"
        raise InvalidObjectKeyError(key, reason)
    if not _SEGMENT.fullmatch(segment):
        reason = f"between slashes it takes letters, digits and . _ = - with no leading dot, not {segment!r}"
        raise InvalidObjectKeyError(key, reason)


def _checked(kind: KeyKind, *segments: str) -> str:
    key = "/".join((kind, *segments))
    check_key(key)
    return key


def _padded(seq: int) -> str:
    if not 0 <= seq < 10**SEQ_DIGITS:
        raise InvalidObjectKeyError(str(seq), f"a seq in a key is 0 or more and has at most {SEQ_DIGITS} digits")
    return f"{seq:0{SEQ_DIGITS}d}"


def _spread(request_id: str) -> str:
    return hashlib.sha256(request_id.encode()).hexdigest()[:2]


def _escape(name: str) -> str:
    """A leading dot is escaped too: it would hide a file, or be `.` or `..`."""
    plain = "".join(chr(byte) if byte in _PLAIN_BYTES else f"={byte:02X}" for byte in name.encode())
    return f"=2E{plain[1:]}" if plain.startswith(".") else plain


def _unescape(key: str, escaped: str) -> str:
    plain = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), escaped)
    try:
        name = plain.encode("latin-1").decode()
    except UnicodeDecodeError as error:
        raise InvalidObjectKeyError(key, f"{escaped!r} is not escaped UTF-8") from error
    if _escape(name) != escaped:
        raise InvalidObjectKeyError(key, f"{escaped!r} is not how {name!r} is escaped")
    return name
