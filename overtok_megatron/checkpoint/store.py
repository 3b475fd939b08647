"""The folder of a run's checkpoints, and how a checkpoint becomes visible: written aside, synced, renamed, named in `latest`.

| in `<run>/checkpoints/` | what it is |
| --- | --- |
| `step_00000100/` | a complete checkpoint |
| `step_00000100.partial/` | one that is being written, or whose writer was killed |
| `latest` | the name of the newest complete checkpoint |

Each checkpoint holds `manifest.json` with the size and SHA-256 of every file, and `manifest.sha256` with the SHA-256 of the
manifest, in the form that `sha256sum -c` reads. A process may be killed at any moment: the previous checkpoint stays
complete, and `clean` removes the rest. This file knows nothing of tensors.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from overtok_megatron.checkpoint.layout import CheckpointLayout
from overtok_megatron.errors import CheckpointError
from overtok_megatron.files import PARTIAL, rename_synced, sync_folders, write_atomically
from overtok_megatron.run_folder import RunFolder

MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"
LATEST = "latest"
_REPLACED = ".replaced.partial"  # suffix of a complete checkpoint that makes room for another one of its step
_FORMAT = 3

Digest = tuple[int, str]  # size in bytes, SHA-256


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is. config: the run's, as a nested dict. files: the digest of each file by its name in the folder.

    data: the fingerprint of each set of the run by its name (`RunData.fingerprints`); empty where nobody recorded them, as in
    checkpoints of versions before that.
    """

    step: int
    consumed_samples: int
    config: dict[str, Any]
    layout: CheckpointLayout
    eod_id: int
    tokenizer_fingerprint: str
    files: dict[str, Digest]
    data: dict[str, str] = field(default_factory=dict)
    format: int = _FORMAT

    def to_values(self) -> dict[str, Any]:
        """The manifest as values of JSON's types."""
        return {**asdict(self), "layout": self.layout.to_numbers()}

    @classmethod
    def from_values(cls, values: Any) -> "Manifest":
        """Raises ValueError, TypeError, LookupError or AttributeError where `values`, parsed JSON, are not a manifest's."""
        files = {name: (entry[0], entry[1]) for name, entry in values["files"].items()}
        return cls(**{**values, "layout": CheckpointLayout.from_numbers(values["layout"]), "files": files})


def file_digest(path: Path) -> Digest:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return path.stat().st_size, digest


def step_of(path: Path) -> int:
    """The step of a complete checkpoint's folder."""
    return int(path.name.removeprefix("step_"))


def _digest_line(manifest: str) -> str:
    return f"{hashlib.sha256(manifest.encode()).hexdigest()}  {MANIFEST}\n"


class CheckpointStore:
    """The checkpoints of one run. Only the first rank calls the methods that change anything."""

    def __init__(self, run_directory: Path) -> None:
        self.root = RunFolder(run_directory).checkpoints

    def partial(self, step: int) -> Path:
        """The folder in which the checkpoint of `step` is being written."""
        return self.root / f"{self.final(step).name}{PARTIAL}"

    def final(self, step: int) -> Path:
        """The folder of a complete checkpoint of `step`."""
        return self.root / f"step_{step:08d}"

    def start_save(self, step: int) -> Path:
        """Make the partial folder of a checkpoint, empty; returns it."""
        folder = self.partial(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def discard(self, step: int) -> None:
        """Remove the partial folder of a save that failed."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def publish(self, manifest: Manifest) -> Path:
        """Make the partial folder of `manifest.step` a complete checkpoint and the latest one."""
        partial = self.partial(manifest.step)
        text = json.dumps(manifest.to_values(), indent=1)
        write_atomically(partial / MANIFEST, text)
        write_atomically(partial / MANIFEST_DIGEST, _digest_line(text))
        sync_folders(partial)
        final = self.final(manifest.step)
        old = final.with_name(final.name + _REPLACED)
        if (
            final.exists()
        ):  # a resumed run saves this step again; clean() puts it back if we are killed before the next line
            os.replace(final, old)
        rename_synced(partial, final)
        write_atomically(self.root / LATEST, final.name)
        if old.exists():
            self._remove(old)
        return final

    def _remove(self, path: Path) -> None:
        """Rename a complete checkpoint, so that it is invisible, then remove it: removing takes long and may be cut."""
        aside = path.with_name(f"{path.name.removesuffix(_REPLACED)}.removed{PARTIAL}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        shutil.rmtree(aside)

    def clean(self) -> list[str]:
        """Remove what killed saves left behind; returns the names."""
        if not self.root.is_dir():
            return []
        for path in self.root.glob(f"*{_REPLACED}"):
            final = path.with_name(path.name.removesuffix(_REPLACED))
            if not final.exists():  # killed between two renames: the old one is the only one
                os.replace(path, final)
        leftovers = [path for path in self.root.iterdir() if path.name.endswith(PARTIAL)]
        for path in leftovers:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return [path.name for path in leftovers]

    def complete(self) -> list[Path]:
        """All complete checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(path.parent for path in self.root.glob(f"step_*/{MANIFEST}") if path.parent.suffix != PARTIAL)

    def prune(self, keep_last: int, keep_every: int | None = None) -> list[Path]:
        """Remove complete checkpoints; returns the removed folders.

        Kept are the `keep_last` newest ones, those of steps that `keep_every` divides, and the one that `latest` names.
        """
        latest = self.latest()  # older than others where a user has turned the pointer back
        doomed = [
            path
            for path in self.complete()[:-keep_last]
            if path != latest and (keep_every is None or step_of(path) % keep_every)
        ]
        for path in doomed:
            self._remove(path)
        return doomed

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None if there is none. Raises CheckpointError on a dangling pointer."""
        pointer = self.root / LATEST
        if not pointer.is_file():
            return None
        text = pointer.read_text(encoding="utf-8", errors="replace")
        path = self.root / " ".join(text.split())  # in one line, for the message
        if not (path / MANIFEST).is_file():
            raise CheckpointError(
                f"{pointer}: names {path.name}, which is not there or has no {MANIFEST}; "
                f"write the name of a folder beside it, or remove {pointer.name} to start anew"
            )
        return path


def find_checkpoint(run: Path) -> Path:
    """The checkpoint in the folder `run`: `run` itself, or the latest one of a run's folder. Raises CheckpointError."""
    if (run / MANIFEST).is_file():
        return run
    path = CheckpointStore(run).latest()
    if path is None:
        why = "" if run.exists() else " (the folder does not exist)"
        raise CheckpointError(
            f"{run}: no checkpoint here{why}; name a run's output folder or one of its checkpoints/step_* folders"
        )
    return path


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder, after checking that every file is there with its size.

    Raises CheckpointError naming the file.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        raw = json.loads(text)
        if raw["format"] != _FORMAT:  # first: another format may have other keys
            raise CheckpointError(f"{path / MANIFEST}: format {raw['format']}, this version reads {_FORMAT}")
        manifest = Manifest.from_values(raw)
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: unreadable ({error}); is this a checkpoint folder?") from None
    digest = path / MANIFEST_DIGEST
    if not digest.is_file() or digest.read_bytes() != _digest_line(text).encode():
        raise CheckpointError(f"{digest}: does not fit {MANIFEST}; the checkpoint is damaged, resume from another one")
    for name, (size, _) in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; the checkpoint is damaged, resume from another one")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file}: {file.stat().st_size} bytes, {size} were written; the checkpoint is "
                "damaged, resume from another one"
            )
    return manifest


def verify_file(path: Path, name: str, manifest: Manifest) -> None:
    """Raises CheckpointError unless the file's content is what was written."""
    if file_digest(path / name)[1] != manifest.files[name][1]:
        raise CheckpointError(
            f"{path / name}: SHA-256 differs from the manifest; the file is damaged, resume from another checkpoint"
        )


def verify_checkpoint(path: Path) -> Manifest:
    """Hash every file of a complete checkpoint again. Raises CheckpointError naming the first that is not what was written."""
    manifest = read_manifest(path)
    for name in sorted(manifest.files):
        verify_file(path, name, manifest)
    known = {*manifest.files, MANIFEST, MANIFEST_DIGEST}
    files = [file for file in path.rglob("*") if file.is_file()]
    foreign = [file for file in files if file.relative_to(path).as_posix() not in known]
    if foreign:
        raise CheckpointError(f"{min(foreign)}: no file of this checkpoint; remove it")
    return manifest
