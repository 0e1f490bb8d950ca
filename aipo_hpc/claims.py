"""Blocks of a shard, each done by the attempt that claimed it: so several attempts at once can do one shard's work.

    <job>/claims/00003/blocks               -> 64                  the number of blocks
    <job>/claims/00003/00012.0              -> aipo-cafe-7.3.r0    block 12 is this attempt's
    <job>/claims/00003/00012.1              -> aipo-cafe-9.3.r0    ... is this one's, the first being over
    <job>/claims/00003/aipo-cafe-8.0.r0.left                       an extra attempt that found nothing more to do

Each is a symbolic link whose target is its content: there at once or not at all, and never replaced. The shard's own
attempt claims from the front and writes the sentinel; extra attempts, sent for a straggling shard, claim from the end and
leave when nothing is free. Rows are kept in each attempt's folder as ever, and a block is done when all its rows are there,
whatever the claims say.

* Two want the same block: one of them makes the link, the other looks again. A listing may be old, the link decides.
* An attempt dies: its blocks stay its own until it is over, which is what the scheduler said when a failure of it was
  recorded or it was begun once more. Then the shard's own attempt can claim the next number of its block, and after that
  reads its rows once more, which are all that there will ever be: nothing is done twice.
* The shard's own attempt dies: the one that is sent next goes on in the same way, beside extra attempts that live.
* Nothing is free, but blocks of living attempts are open: the own attempt waits, for their rows or for their end.
* The sentinel is there: the folder is removed, a claim fails, and who wanted it leaves.
"""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from aipo_hpc.durable import full_disk_named, list_names, sync_folder
from aipo_hpc.errors import AipoError
from aipo_hpc.job_folder import JobFolder

_CLAIMS, _BLOCKS, _LEFT = "claims", "blocks", ".left"


class NothingLeft(AipoError):
    """All that this attempt could do of its shard is done; the sentinel is for another one to write."""


class Claims:
    """The claims on one shard, as one of its attempts sees and makes them."""

    def __init__(self, job: JobFolder, shard: int, attempt: str, fingerprint: str, extra: bool = False) -> None:
        self._job = job
        self._shard = shard
        self._attempt = attempt
        self._fingerprint = fingerprint
        self._folder = _folder(job, shard)
        self.extra = extra
        """Whether another attempt is the one to write the sentinel."""
        self._made: set[str] = set()
        self._owners: dict[str, str] = {}
        self._ended: set[str] = set()

    def open(self, num_blocks: int) -> bool:
        """Begin, with blocks 0 to ``num_blocks`` - 1. False: the shard was divided in another way, so nothing can be claimed.

        It was if this attempt has smaller batches, after a death for want of memory. Raises NothingLeft in an extra attempt
        of a shard that cannot be shared with it.
        """
        if not self.extra:
            with full_disk_named(self._folder):
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._link(_BLOCKS, str(num_blocks))
        there = _number_of_blocks(self._folder)
        if there is None:
            raise self._nothing_left()
        if there != num_blocks and self.extra:
            self.leave()
        return there == num_blocks

    def take(self, wanted: Sequence[int]) -> tuple[int, bool] | None:
        """Claim one of these blocks. None: none of them is free.

        True: it had been claimed before, by an attempt that is over and whose rows are to be looked at again.
        """
        while True:
            standing = self._standing()
            free = (block for block in (reversed(wanted) if self.extra else wanted) if self._is_free(block, standing))
            block = next(free, None)
            if block is None:
                return None
            number = standing[block][0] + 1 if block in standing else 0
            if self._link(f"{block:05d}.{number}", self._attempt):
                return block, number > 0

    def any_free(self, wanted: Iterable[int]) -> bool:
        """Whether one of these blocks could be claimed."""
        standing = self._standing()
        return any(self._is_free(block, standing) for block in wanted)

    def others(self) -> list[Path]:
        """Folders of the other attempts at the shard."""
        own = self._job.attempt_folder(self._shard, self._attempt)
        return [own.with_name(name) for name in sorted(list_names(own.parent)) if name != own.name]

    def shard_is_done(self) -> bool:
        """Whether the shard has its sentinel."""
        return self._shard in self._job.done(self._fingerprint, only=(self._shard,))

    def _nothing_left(self) -> NothingLeft:
        return NothingLeft(f"{self._job.name} shard {self._shard}: nothing is left to do for {self._attempt}")

    def leave(self) -> NoReturn:
        """Leave the rest to others. Raises NothingLeft; that an extra attempt did so is noted before."""
        if self.extra:
            self._link(f"{self._attempt}{_LEFT}", "left")
        raise self._nothing_left()

    def remove(self) -> None:
        """The shard is done, nobody claims any more."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _standing(self) -> dict[int, tuple[int, str]]:
        """By block: the number of its last claim, and whose that is."""
        found: dict[int, tuple[int, str]] = {}
        names = list_names(self._folder)
        self._ended |= {name.removesuffix(_LEFT) for name in names if name.endswith(_LEFT)}
        for name in names:
            digits, _, number = name.partition(".")
            if not (digits.isdecimal() and number.isdecimal()):
                continue
            if int(digits) not in found or found[int(digits)][0] < int(number):
                found[int(digits)] = (int(number), name)
        return {block: (number, self._owner(name)) for block, (number, name) in found.items()}

    def _owner(self, name: str) -> str:
        """Whose a claim is. One of this attempt's name that it did not make is of its first try, which is over."""
        if name not in self._owners:
            try:
                self._owners[name] = os.readlink(self._folder / name)
            except FileNotFoundError:  # removed, the shard is done
                return self._attempt
        owner = self._owners[name]
        return "" if owner == self._attempt and name not in self._made else owner

    def _is_free(self, block: int, standing: dict[int, tuple[int, str]]) -> bool:
        """Never claimed; or by one that is over, if this is the shard's own attempt: what kills tasks kills few so."""
        return block not in standing or (not self.extra and self._is_over(standing[block][1]))

    def _is_over(self, owner: str) -> bool:
        """Whether an attempt does nothing any more."""
        if owner == self._attempt:
            return False
        if owner and owner not in self._ended:
            element, _, restart = owner.rpartition(".r")
            later = [name.rpartition(".r") for name in list_names(self._job.attempt_folder(self._shard, owner).parent)]
            if any(name == element and int(number) > int(restart) for name, _, number in later if number.isdecimal()):
                self._ended.add(owner)
            for failure in self._job.failures():
                if failure.attempt == owner or (failure.by_driver and failure.attempt.rpartition(".")[0] == element):
                    self._ended.add(owner)
        return not owner or owner in self._ended

    def _link(self, name: str, content: str) -> bool:
        """Make a link, unless there is one of that name. Raises NothingLeft if the folder is gone: the shard is done."""
        try:
            with full_disk_named(self._folder):
                os.symlink(content, self._folder / name)
                self._made.add(name)
                sync_folder(self._folder)
        except FileExistsError:
            # Or it is our own: a server that repeats a request whose answer was lost says this too. It then counts as one
            # of a first try of ours, which is over.
            return False
        except FileNotFoundError:
            raise self._nothing_left() from None
        return True


def is_shared(job: JobFolder, shard: int) -> bool:
    """Whether an attempt at this shard is at work that others can join."""
    return _number_of_blocks(_folder(job, shard)) is not None


def unclaimed(job: JobFolder, shard: int) -> int:
    """How many blocks of a shard nobody has claimed yet; 0 if it has none to share."""
    folder = _folder(job, shard)
    number = _number_of_blocks(folder)
    claimed = {name.partition(".")[0] for name in list_names(folder) if name.partition(".")[0].isdecimal()}
    return 0 if number is None else number - len(claimed)


def left(job: JobFolder, shard: int) -> set[str]:
    """The extra attempts at a shard that are over because nothing was left for them."""
    return {name.removesuffix(_LEFT) for name in list_names(_folder(job, shard)) if name.endswith(_LEFT)}


def _folder(job: JobFolder, shard: int) -> Path:
    return job.path / _CLAIMS / f"{shard:05d}"


def _number_of_blocks(folder: Path) -> int | None:
    try:
        return int(os.readlink(folder / _BLOCKS))
    except FileNotFoundError:
        return None
