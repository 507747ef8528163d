"""Everything that storage can refuse or fail at.

    StorageError
    ├── ObjectNotFoundError           no object lies under the key
    ├── DamagedObjectError            what lies under the key is not what was written
    ├── InvalidObjectKeyError         the key itself is refused, whatever lies there
    ├── ObjectStoreRefusedError       wrong credentials, no such bucket, not permitted: needs an operator
    ├── ObjectStoreUnavailableError   unreachable, overloaded, disk full: trying again may help
    ├── DatabaseRefusedError          wrong URL: needs an operator
    ├── DatabaseUnavailableError      unreachable, full, locked for too long: trying again may help
    ├── RowNotFoundError              no such account, run, checkpoint … (or it is another account's)
    ├── UploadGoneError               the object was swept away before it was named: upload again under a new key
    ├── LeaseLostError                another worker has the run; what was computed is discarded
    └── ClaimLostError                another worker has the sample; what was computed is discarded

A class says whose fault it is (`fault`) and whether the same call may succeed later (`retryable`).
No message holds a secret: credentials never reach these classes.
"""

from typing import ClassVar, Literal


class StorageError(Exception):
    """Storage failed."""

    fault: ClassVar[Literal["user", "server"]] = "server"
    retryable: ClassVar[bool] = False


# --- objects ---------------------------------------------------------------------------------------------------------


class ObjectNotFoundError(StorageError):
    """No object lies under this key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"no object lies under the key {key!r}")
        self.key = key


class DamagedObjectError(StorageError):
    """An object's bytes do not match their checksum."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the object {key!r} is damaged: its bytes do not match its checksum")
        self.key = key


class InvalidObjectKeyError(StorageError):
    """This is not an object key."""

    fault = "user"

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key!r} is not an object key: {reason}")
        self.key = key
        self.reason = reason


class ObjectStoreRefusedError(StorageError):
    """The object store refuses us: correct its URL, its credentials or its permissions."""

    def __init__(self, store: str, reason: str) -> None:
        super().__init__(f"the object store {store} refuses: {reason}")
        self.store = store
        self.reason = reason


class ObjectStoreUnavailableError(StorageError):
    """The object store cannot be reached or cannot serve; trying again may help."""

    retryable = True

    def __init__(self, store: str, reason: str) -> None:
        super().__init__(f"the object store {store} is unavailable: {reason}")
        self.store = store
        self.reason = reason


# --- rows ------------------------------------------------------------------------------------------------------------


class DatabaseRefusedError(StorageError):
    """The URL of the database is wrong: correct PIECEWORK_DATABASE_URL."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the database is not opened: {reason}")
        self.reason = reason


class DatabaseUnavailableError(StorageError):
    """The database cannot be reached or cannot serve; trying again may help."""

    retryable = True

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"the database {url} is unavailable: {reason}")
        self.reason = reason


class RowNotFoundError(StorageError):
    """There is no such thing, or not in this account: from outside the two look the same."""

    fault = "user"

    def __init__(self, noun: str, name: object) -> None:
        super().__init__(f"there is no {noun} {name!r}")
        self.noun = noun
        self.name = name


class UploadGoneError(StorageError):
    """The object's upload row expired before a row named it: upload again under a new key."""

    retryable = True

    def __init__(self, key: str) -> None:
        super().__init__(f"the upload of {key!r} expired before it was named")
        self.key = key


class LeaseLostError(StorageError):
    """The run's lease has gone to another worker; nothing of this one's work may be committed."""

    def __init__(self, run_id: str, epoch: int, holder: str | None = None) -> None:
        super().__init__(f"run {run_id}: epoch {epoch} is over, the lease is held by {holder or 'nobody'}")
        self.run_id = run_id
        self.epoch = epoch
        self.holder = holder


class ClaimLostError(StorageError):
    """The sample is claimed by another worker or attempt; nothing of this one's work may be committed."""

    def __init__(self, request_id: str, attempt: int) -> None:
        super().__init__(f"sample {request_id}: attempt {attempt} is not the current one")
        self.request_id = request_id
        self.attempt = attempt
