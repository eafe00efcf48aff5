"""Which special remotes of a dataset may be used, and how they are enabled in a clone of ours.

A dataset's own record of its remotes is untrusted: of all that it names, only OpenNeuro's public
bucket passes by itself. Whatever else is used was named by the user.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tio_openneuro.annex import (
    CommandError,
    SpecialRemote,
    branch_tips,
    configured_uuids,
    git_config,
    is_amazon,
    run,
    special_remotes,
    verification,
)
from tio_openneuro.errors import TioOpenNeuroError, UnsafeDatasetError

_LOG = logging.getLogger(__name__)

PUBLIC_REMOTE = "s3-PUBLIC"
_BUCKET = "openneuro.org"
_HOST = "s3.amazonaws.com"
_FORBIDDEN_FIELDS = frozenset({"s3creds", "cipher", "cipherkeys", "externaltype", "sameas"})
_ENABLE_TIMEOUT_S = 120.0


def public_remote(clone: Path) -> SpecialRemote | None:
    """Return the record of OpenNeuro's public bucket; None where the dataset has none.

    Args:
        clone: The clone's folder; its own git-annex branch and its remotes' are all read.

    Raises:
        UnsafeDatasetError: A remote bears the name, and none that does is what it should be.
    """
    named = [each for each in _records(clone, PUBLIC_REMOTE) if not each.dead]
    refused = {each.uuid: complaint for each in named if (complaint := _complaint(each))}
    sound = {each.uuid: each for each in named if each.uuid not in refused}
    if sound:
        return list(sound.values())[-1]
    if refused:
        raise UnsafeDatasetError(
            f"Refused to use the dataset in {clone}: its remote {PUBLIC_REMOTE} is not "
            f"OpenNeuro's public bucket ({'; '.join(refused.values())}). If you trust it all the "
            f"same, enable it in a clone of your own, under another name, and name it with "
            f"remotes=."
        )
    return None


def enable(clone: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Enable the public bucket and the remotes that the user names, and return what is usable.

    Args:
        clone: A clone of ours, initialised.
        names: Remotes that the user trusts.

    Raises:
        UnsafeDatasetError: The public bucket's record is not what it should be.
        TioOpenNeuroError: A named remote is not known, or cannot be enabled.
    """
    usable = list(names)
    enabled = configured_uuids(clone)
    if PUBLIC_REMOTE not in names:
        public = public_remote(clone)
        if public is None:
            _LOG.warning(
                "The dataset in %s has no remote %s: content can be fetched only from remotes "
                "that you name with remotes=.",
                clone,
                PUBLIC_REMOTE,
            )
        else:
            usable.insert(0, PUBLIC_REMOTE)
            if enabled.get(PUBLIC_REMOTE) != public.uuid:
                _enable_special(clone, public)
    for name in names:
        if name not in enabled:
            _enable_named(clone, name)
    return tuple(usable)


def usable(clone: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the remotes that may be used in a user's clone, with the ids that are known.

    Nothing is changed there. In a clone that plain git made, the public bucket needs not be
    enabled, nor a git remote, which git-annex asks for its id.

    Args:
        clone: The clone's folder.
        names: Remotes that the user trusts, beside OpenNeuro's public bucket.

    Raises:
        UnsafeDatasetError: The public bucket's record is not what it should be.
        TioOpenNeuroError: A named remote is not enabled in the clone.
    """
    plain = not git_config(clone, r"^annex\.uuid$", "--local")
    enabled = configured_uuids(clone)
    if plain:
        remotes = run(["git", "remote"], cwd=clone).decode().split()
        enabled = dict.fromkeys([PUBLIC_REMOTE, *remotes], "") | enabled
    missing = [name for name in names if name not in enabled]
    if missing:
        raise TioOpenNeuroError(
            f"Cannot use the remotes {', '.join(missing)} of {clone}: the clone has "
            f"{', '.join(sorted(enabled)) or 'none'}. Run 'git annex enableremote NAME' there."
        )
    named = {name: enabled[name] for name in names}
    if PUBLIC_REMOTE in names and not plain:
        return named
    public = public_remote(clone)
    if public is not None and (plain or enabled.get(PUBLIC_REMOTE) == public.uuid):
        return {PUBLIC_REMOTE: public.uuid, **named}
    if not names:
        _LOG.warning(
            "Nothing can be fetched into %s: its remotes are %s. Name one with remotes=, or run "
            "'git annex enableremote %s' there.",
            clone,
            ", ".join(sorted(enabled)) or "none",
            PUBLIC_REMOTE,
        )
    return named


def _complaint(remote: SpecialRemote) -> str:
    """Return why a remote is not OpenNeuro's public bucket; empty where it is."""
    fields = remote.fields
    public_url = fields.get("publicurl", "")
    try:
        url = urlsplit(public_url)
    except ValueError:
        return f"its publicurl is {public_url!r}"
    host = url.hostname or ""
    odd = ", ".join(sorted(_FORBIDDEN_FIELDS.intersection(fields)))
    # git-annex itself refuses loopback addresses, unless the user's own configuration allows it:
    # a bucket that the user serves may have any name.
    here = _is_loopback(host)
    stated = fields.get("host", _HOST)
    checks = (
        (fields.get("type") == "S3", f"its type is {fields.get('type')!r}, not 'S3'"),
        (not odd, f"it has the fields {odd}"),
        (fields.get("encryption", "none") == "none", "it is encrypted"),
        (here or fields.get("bucket") == _BUCKET, f"its bucket is {fields.get('bucket')!r}"),
        (is_amazon(stated) or (here and _is_loopback(stated)), f"its host is {stated!r}"),
        (url.scheme in {"http", "https"}, f"its publicurl is {public_url!r}"),
        ("@" not in url.netloc, f"its publicurl is {public_url!r}"),
        (is_amazon(host) or here, f"its publicurl leads to {host!r}"),
    )
    return next((complaint for sound, complaint in checks if not sound), "")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _enable_special(clone: Path, remote: SpecialRemote) -> None:
    """Enable a special remote, by its id where another bears the same name."""
    alone = len({each.uuid for each in _records(clone, remote.name)}) == 1
    name = remote.name if alone else remote.uuid
    try:
        said = run(
            ["git", "annex", "enableremote", name], cwd=clone, timeout_s=_ENABLE_TIMEOUT_S
        ).decode(errors="replace")
        if number := verification(said):
            # Newer git-annex uses no remote of others' making before somebody looked at it: that
            # was done above, or by the user who named it.
            command = ["git", "annex", "verifyremote", remote.name, "--safe", number]
            run(command, cwd=clone, timeout_s=_ENABLE_TIMEOUT_S)
            if not alone:
                run(["git", "config", "--remove-section", f"remote.{remote.uuid}"], cwd=clone)
    except CommandError as error:
        raise TioOpenNeuroError(
            f"Cannot enable the remote {remote.name} (type {remote.fields.get('type')}) in "
            f"{clone}: {error.stderr or error}. Enable it in a clone of your own, and give that "
            f"clone's path as the source."
        ) from error


def _enable_named(clone: Path, name: str) -> None:
    """Enable a remote that the user names: a git remote, or a special one on record."""
    if name in run(["git", "remote"], cwd=clone).decode().split():
        run(["git", "config", f"remote.{name}.annex-ignore", "false"], cwd=clone)
        # git-annex asks the remote for its id when it next runs.
        run(["git", "annex", "info", "--fast", name], cwd=clone, timeout_s=_ENABLE_TIMEOUT_S)
        if name not in configured_uuids(clone):
            raise TioOpenNeuroError(
                f"Cannot use the remote {name} of {clone}: git-annex cannot reach an annex "
                f"there. Look whether it is one, and whether git-annex is installed there."
            )
        return
    named = {each.uuid: each for each in _records(clone, name)}
    living = [each for each in named.values() if not each.dead]
    if not living:
        known = sorted({each.name for each in _records(clone) if each.name})
        raise TioOpenNeuroError(
            f"Cannot use the remote {name!r}: the dataset in {clone} records "
            f"{', '.join(known) or 'none'}. Look at the name."
        )
    _enable_special(clone, living[-1])


def _records(clone: Path, name: str | None = None) -> list[SpecialRemote]:
    """Return the special remotes on record, dead ones too, all or those of a name."""
    return [
        each for each in special_remotes(clone, branch_tips(clone)) if name in {None, each.name}
    ]
