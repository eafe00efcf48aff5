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
    """Base of every error that this library raises on purpose.

    Example:
        >>> import tio_openneuro as tno
        >>> try:
        ...     tno.DataladSubjectsDataset("ds004199", version="0.0.0-none")
        ... except tno.TioOpenNeuroError as error:
        ...     print(error)
        Cannot ...0.0.0-none...
    """

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
    """The disk budget cannot hold what is asked of it.

    Example:
        >>> import tio_openneuro as tno
        >>> images = {"t1": tno.Scalar(suffix="T1w")}
        >>> try:
        ...     tno.DataladSubjectsDataset("ds000001", images, disk_budget="1 kB")
        ... except tno.DiskBudgetError as error:
        ...     print(error)
        Cannot ...1.0 kB...
    """


class RamBudgetError(TioOpenNeuroError):
    """The RAM budget cannot hold what is asked of it.

    Example:
        >>> import torch, torchio as tio, tio_openneuro as tno
        >>> image = tio.ScalarImage(tensor=torch.zeros(1, 64, 64, 64))
        >>> try:
        ...     tno.BudgetedQueue(tio.SubjectsDataset([tio.Subject(t1=image)]), ram_budget="1 MB")
        ... except tno.RamBudgetError as error:
        ...     print(error)
        Cannot ...1.0 MB...
    """


class FetchError(TioOpenNeuroError):
    """Content could not be fetched.

    Example:
        >>> import tio_openneuro as tno
        >>> images = {"flair": tno.Scalar("sub-*/anat/*_FLAIR.nii.gz")}
        >>> with tno.DataladSubjectsDataset("ds004199", images, disk_budget="2 GB") as dataset:
        ...     try:
        ...         subject = dataset[0]
        ...     except tno.FetchError as error:
        ...         print(f"{error.unit} is left out: {error}")
    """


class RemoteUnavailableError(FetchError):
    """The remote cannot be reached, or refuses to give the content.

    Example:
        >>> import tio_openneuro as tno
        >>> try:
        ...     tno.DataladSubjectsDataset("http://127.0.0.1:9/nobody.git")
        ... except tno.RemoteUnavailableError as error:
        ...     print(error)
        Cannot ...127.0.0.1...
    """


class ContentMismatchError(FetchError):
    """What arrived has another size or checksum than the annex key says.

    Example:
        >>> import tio_openneuro as tno
        >>> issubclass(tno.ContentMismatchError, tno.FetchError)
        True
        >>> tno.ContentMismatchError("...", key="MD5E-s3--900150983cd24fb0.nii.gz").key
        'MD5E-s3--900150983cd24fb0.nii.gz'
    """


class DropRefusedError(TioOpenNeuroError):
    """Content was not dropped, since no remote is known to give it back.

    Example:
        >>> import tio_openneuro as tno
        >>> images = {"flair": tno.Scalar("sub-*/anat/*_FLAIR.nii.gz")}
        >>> with tno.DataladSubjectsDataset("ds004199", images, disk_budget="2 GB") as dataset:
        ...     try:
        ...         dropped_bytes = dataset.evict()
        ...     except tno.DropRefusedError as error:
        ...         print(f"{error.key} stays: {error}")
        >>> dropped_bytes
        0
    """


class NotAnAnnexError(TioOpenNeuroError):
    """The source is not a git-annex dataset.

    Example:
        >>> import pathlib, tio_openneuro as tno
        >>> pathlib.Path("empty").mkdir()
        >>> try:
        ...     tno.DataladSubjectsDataset("empty")
        ... except tno.NotAnAnnexError as error:
        ...     print(error)
        Cannot ...empty...
    """


class SelectionError(TioOpenNeuroError, ValueError):
    """The patterns select nothing, or what cannot be batched.

    Example:
        >>> import tio_openneuro as tno
        >>> images = {"flair": tno.Scalar("sub-*/anat/*_FLIAR.nii.gz")}
        >>> try:
        ...     tno.DataladSubjectsDataset("ds004199", images)
        ... except tno.SelectionError as error:
        ...     print(error)
        No image file matches 'flair' = ... The nearest that exist: sub-*/anat/...FLAIR.nii.gz ...
    """


class SplitError(TioOpenNeuroError, ValueError):
    """The units cannot be divided as asked.

    Example:
        >>> import tio_openneuro as tno
        >>> images = {"t1": tno.Scalar(suffix="T1w")}
        >>> with tno.DataladSubjectsDataset("ds000001", images, disk_budget="2 GB") as dataset:
        ...     try:
        ...         dataset.split({"train": 0.8, "val": 0.3})
        ...     except tno.SplitError as error:
        ...         print(error)
        Cannot split by ...: shares must be positive and sum to 1.
    """


class UnsafeDatasetError(TioOpenNeuroError):
    """The repository tries something that an untrusted dataset must not.

    Example:
        >>> import pathlib, tio_openneuro as tno
        >>> file = pathlib.Path("bids/sub-01/anat/sub-01_T1w.nii.gz")
        >>> file.parent.mkdir(parents=True)
        >>> pathlib.Path("bids/dataset_description.json").write_text("{}")
        2
        >>> file.write_bytes(bytes(100))
        100
        >>> try:
        ...     tno.DataladSubjectsDataset("bids", {"t1": tno.Scalar(suffix="T1w")})[0]
        ... except tno.UnsafeDatasetError as error:
        ...     print(error)
        Refused to load ...sub-01_T1w.nii.gz...
    """


class DamagedImageError(TioOpenNeuroError):
    """An image file is gone, cut off, fails its own checksum, or has a header that lies.

    Example:
        >>> import pathlib, torch, torchio as tio, tio_openneuro as tno
        >>> file = pathlib.Path("bids/sub-01/anat/sub-01_T1w.nii.gz")
        >>> file.parent.mkdir(parents=True)
        >>> pathlib.Path("bids/dataset_description.json").write_text("{}")
        2
        >>> tio.ScalarImage(tensor=torch.rand(1, 32, 32, 32)).save(file)
        >>> file.write_bytes(file.read_bytes()[:9000])
        9000
        >>> try:
        ...     tno.DataladSubjectsDataset("bids", {"t1": tno.Scalar(suffix="T1w")})[0]
        ... except tno.DamagedImageError as error:
        ...     print(error)
        Cannot ...sub-01_T1w.nii.gz...
    """


class LedgerError(TioOpenNeuroError):
    """The ledger cannot be kept, or disagrees with the disk.

    Example:
        >>> import tio_openneuro as tno
        >>> try:
        ...     tno.DataladSubjectsDataset("ds004199", root="/tmp/" + 100 * "long/")
        ... except tno.LedgerError as error:
        ...     print(error)
        Cannot ...450...
    """
