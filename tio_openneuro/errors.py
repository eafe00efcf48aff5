"""The errors that this library raises, and nothing else.

    TioOpenNeuroError
    ├── DiskBudgetError          the disk budget cannot hold what is asked of it
    ├── RamBudgetError           the RAM budget cannot hold what is asked of it
    ├── FetchError               content did not arrive
    │   ├── RemoteUnavailableError   the remote cannot be reached, or refuses
    │   └── ContentMismatchError     what arrived is not what the annex key says
    ├── DropRefusedError         content that no remote can give back
    ├── NotAnAnnexError          the source is not a git-annex dataset
    ├── SelectionError           the patterns do not select what can be batched (ValueError)
    ├── SplitError               the units cannot be divided as asked (ValueError)
    ├── UnsafeDatasetError       the repository tries what it must not
    ├── DamagedImageError        a file is gone or cut off, fails its checksum, or its header lies
    └── LedgerError              disk and ledger disagree, or the root cannot hold a ledger

Every message says what could not be done, to which named thing, the numbers, the likely cause,
and what to do next. Each class takes the message alone, since PyTorch's DataLoader workers
rebuild an exception as ``type(error)(message)``; further facts are keyword-only attributes.
"""

from __future__ import annotations


class TioOpenNeuroError(Exception):
    """Base of every error that this library raises on purpose."""

    def __init__(self, message: str = "", *, key: str = "", unit: str = "") -> None:
        """Keep the message, and where known the annex key and the unit concerned.

        Args:
            message: The whole message, numbers included.
            key: Name of the annex key concerned, or an empty string.
            unit: Name of the unit concerned (``"sub-07"``), or an empty string.
        """
        # What others named may hold what a terminal obeys.
        shown = (c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
        super().__init__("".join(shown))
        self.key = key
        self.unit = unit


class DiskBudgetError(TioOpenNeuroError):
    """The disk budget cannot hold what is asked of it."""


class RamBudgetError(TioOpenNeuroError):
    """The RAM budget cannot hold what is asked of it."""


class FetchError(TioOpenNeuroError):
    """Content could not be fetched."""


class RemoteUnavailableError(FetchError):
    """The remote cannot be reached, or refuses to give the content."""


class ContentMismatchError(FetchError):
    """What arrived has another size or checksum than the annex key says."""


class DropRefusedError(TioOpenNeuroError):
    """Content was not dropped, since no remote is known to give it back."""


class NotAnAnnexError(TioOpenNeuroError):
    """The source is not a git-annex dataset."""


class SelectionError(TioOpenNeuroError, ValueError):
    """The patterns select nothing, or what cannot be batched."""


class SplitError(TioOpenNeuroError, ValueError):
    """The units cannot be divided as asked."""


class UnsafeDatasetError(TioOpenNeuroError):
    """The repository tries something that an untrusted dataset must not."""


class DamagedImageError(TioOpenNeuroError):
    """An image file is gone, cut off, fails its own checksum, or has a header that lies."""


class LedgerError(TioOpenNeuroError):
    """The ledger cannot be kept, or disagrees with the disk."""
