"""RAM admission arithmetic."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tio_openneuro.errors import RamBudgetError
from tio_openneuro.ram.admission import THREAD_BYTES, Admission, Need, bound_subject, read_budget
from tio_openneuro.volumes.headers import (
    VolumeFile,
    announce_files,
    announce_size,
    listening,
    sum_sizes,
)


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), max_size=40))
def test_charges_never_pass_the_budget_while_bounds_hold(requests):
    """Whatever is asked for, charged bytes stay within the budget, and all of them return."""
    admission = Admission(100, base_bytes=0)
    held = []
    for size, kept_share in requests:
        if not admission.fits(size):
            with pytest.raises(RamBudgetError, match="100 bytes"):
                admission.charge(size)
            if held:
                admission.release(held.pop())
            admission.measured(0)
            continue
        admission.charge(size)
        kept = int(size * kept_share)
        admission.settle(size, kept)
        held.append(kept)
        assert admission.charged_bytes == sum(held) <= 100
    assert admission.peak_bytes <= 100
    for kept in held:
        admission.release(kept)
    assert admission.charged_bytes == 0


def test_releasing_more_than_was_charged_is_an_error():
    """A release without a charge is a mistake in the caller, and says so."""
    admission = Admission(10, base_bytes=0)
    admission.charge(4)
    with pytest.raises(ValueError, match="3 bytes more"):
        admission.release(7)


def test_freed_memory_counts_until_it_is_returned():
    """The allocator may keep what was freed, so that it is no room before it is given back."""
    admission = Admission(10, base_bytes=2)
    admission.charge(8)
    admission.settle(8, 3)
    assert (admission.charged_bytes, admission.retained_bytes) == (5, 5)
    assert not admission.fits(1)
    admission.measured(0)
    assert admission.fits(5)
    assert not admission.fits(6)
    assert not admission.idle
    admission.release(3)
    assert admission.idle
    assert admission.capacity_bytes == 8


def test_what_the_allocator_holds_free_counts_whatever_was_charged_for_it():
    """A bound that was too low is seen in what is free; what was given back is not in use again."""
    admission = Admission(100, base_bytes=0)
    admission.charge(10)
    admission.settle(10, 4)
    admission.measured(50)  # six were charged for it
    assert admission.retained_bytes == 50
    assert not admission.fits(47)
    admission.returned(50)  # all of it is unmapped now, and still counts as free to the allocator
    assert admission.fits(96)
    admission.measured(50)
    assert admission.fits(96)
    admission.measured(70)
    assert admission.retained_bytes == 20
    admission.measured(30)  # what was given back is in use again, at least in part
    admission.measured(60)
    assert admission.retained_bytes == 30


def test_what_exists_is_counted_even_where_a_bound_was_wrong():
    """More kept than charged shows in the peak, and nothing fits until it is gone."""
    admission = Admission(10, base_bytes=0)
    admission.charge(5)
    admission.settle(5, 14)
    assert admission.peak_bytes == 14
    assert not admission.fits(0)


def test_half_of_the_available_memory_is_the_default_budget():
    """Text and numbers are sizes; "auto" is half of what the machine has left."""
    assert read_budget("auto", 1000) == 500
    assert read_budget("2 KiB", 1000) == 2048
    assert read_budget(77, 1000) == 77
    with pytest.raises(ValueError, match="as a size"):
        read_budget("lots", 1000)


def test_the_bound_is_that_of_the_hungriest_step():
    """Decoding, transforming and sampling follow one another; only the largest counts."""
    size = sum_sizes([(2, 10**6, 4), (1, 10**6, 4)])
    plain = bound_subject(size, size, [], 0)
    sampled = bound_subject(size, size, [], 9)
    needs = [Need(60 * 10**6, "RandomSpike"), Need(70 * 10**6, "RandomMotion")]
    transformed = bound_subject(size, size, needs, 9)
    assert plain == (THREAD_BYTES + (12 + 8) * 10**6, "decoding")
    assert sampled == (THREAD_BYTES + (12 + 9) * 10**6, "the sampler")
    assert transformed == (THREAD_BYTES + 70 * 10**6, "RandomMotion")


def test_headers_tell_sizes_without_decoding(tmp_path):
    """Channels, voxels and bytes come from the header, also where the data are cut off."""
    path = tmp_path / "dwi.nii.gz"
    voxels = np.random.default_rng(0).integers(0, 999, (4, 5, 6, 7), dtype=np.int16)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    assert VolumeFile(path).size == (7, 120, 4, ((4, 1.0), (5, 1.0), (6, 1.0)))
    path.write_bytes(path.read_bytes()[:-200])
    assert VolumeFile(path).size[:3] == (7, 120, 4)
    assert VolumeFile(tmp_path / "absent.nii.gz").size is None
    (tmp_path / "text.nii").write_text("no image")
    assert VolumeFile(tmp_path / "text.nii").size is None
    assert VolumeFile(tmp_path / "image.png").size is None


def test_announced_files_reach_the_listener_of_this_thread_only_while_it_listens(tmp_path):
    """Sizes are summed over a subject's files, and what the listener raises stops the loading."""
    path = tmp_path / "t1.nii"
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4)), path)
    heard = []
    with listening(heard.append):
        announce_files([VolumeFile(path), VolumeFile(path)])
        announce_files([VolumeFile(path), VolumeFile(tmp_path / "absent.nii")])
        lying = tmp_path / "lying.nii"
        lying.write_bytes(path.read_bytes()[:42] + b"\0\0" + path.read_bytes()[44:])
        announce_files([VolumeFile(path), VolumeFile(lying)])
    announce_files([VolumeFile(path)])
    # What cannot be believed is refused before it is decoded, and hides no other file's size.
    size = VolumeFile(path).size
    assert heard == [sum_sizes([size, size]), sum_sizes([size])]

    def refuse(_size):
        message = "too large"
        raise RamBudgetError(message)

    with listening(refuse), pytest.raises(RamBudgetError, match="too large"):
        announce_size(heard[0])
