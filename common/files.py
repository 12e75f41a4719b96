"""Files: written whole or not at all, and read with one clear line where something is wrong."""
from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from common import fail, short
from common.processes import RANK, one_writes

Fields = dict[str, type | tuple[type, ...]]


# ---- writing -------------------------------------------------------------------------------------


def atomic_write(path: str | Path,
                 content: bytes | Callable[[BinaryIO], None],
                 keep: Path | None = None) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old file or the new one and
    nothing between.

    Args:
        content: the bytes, or a function that writes them to an open binary file.
        keep: where the file that was there before is moved to, just before the new one takes its
            place.
    Raises:
        SystemExit with the path and the reason: a full disk, no permission.
    """
    with one_writes() as writer:
        if writer:
            _atomic_write(Path(path), content, keep)


def _atomic_write(path: Path, content: bytes | Callable[[BinaryIO], None],
                  keep: Path | None) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_temporary(path)
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    # on a full disk, torch.save makes a RuntimeError out of the OSError
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        fail(f"{path}: cannot be written ({reason.strerror})")
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # a read-only disk, a file for a folder: the reason is on its way already


def delete(paths: Iterable[Path]) -> None:
    """Remove files that may be there."""
    with one_writes() as writer:
        if writer:
            for path in paths:
                path.unlink(missing_ok=True)


def clear_temporary(path: Path) -> None:
    """Remove what a killed process left of an earlier attempt to write this file or folder:
    .NAME.PID.tmp."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        pid = left.name.split(".")[-2]
        if pid.isdecimal() and not is_running(int(pid)) and left.is_file():
            left.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether there is a process of this number; itself, too."""
    if os.name == "nt":  # os.kill would end it there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write_json(path: str | Path, value: Any) -> None:
    """Indented JSON, UTF-8, readable as it is."""
    atomic_write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """One JSON object a line, UTF-8, readable as it is."""
    def write(file: BinaryIO) -> None:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    atomic_write(path, write)


def check_writable(folder: str | Path) -> None:
    """Stop if this folder cannot be made or written to. Changes nothing, so it can be asked before
    hours of work."""
    try:
        folder = Path(folder)
        if "\0" in str(folder) or max(len(os.fsencode(part))
                                      for part in (".", *folder.parts)) > 255:
            raise ValueError("at most 255 bytes, and none of them NUL")
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        # Windows has no statvfs
        on_read_only_disk = hasattr(os, "statvfs") and os.statvfs(there).f_flag & os.ST_RDONLY
        if not there.is_dir():
            reason = f"{there} is not a folder"
        elif on_read_only_disk or not os.access(there, os.W_OK | os.X_OK):
            reason = f"{there} is not writable"
        else:
            return
    # a name that is too long, or has a NUL or a lone surrogate in it
    except (OSError, ValueError) as error:
        fail(f"{str(folder)[:80]!r}: no name for a folder "
             f"({short(getattr(error, 'strerror', None) or error)})")
    fail(f"{folder}: cannot be written ({reason})")


# ---- reading -------------------------------------------------------------------------------------

def read_json(path: str | Path) -> Any:
    """Raises SystemExit if there is no such file, or it is no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except FileNotFoundError:
        fail(f"{path}: no such file")
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror})")
    except (ValueError, RecursionError) as error:
        fail(f"{path}: not JSON ({short(error)})")


def read_json_object(path: str | Path, *fields: str) -> dict:
    """A JSON object that has these fields, such as a config.json. Raises SystemExit with the first
    that is missing."""
    value = read_json(path)
    if not isinstance(value, dict):
        fail(f"{path}: expected a JSON object, found {type(value).__name__}")
    if missing := [name for name in fields if name not in value]:
        fail(f"{path}: no field {missing[0]!r}")
    return value


def read_jsonl(path: str | Path, fields: Fields) -> list[dict]:
    """Rows of a JSON-lines file (or .gz, .xz), each checked, each with the "line" it stands on.

    Args:
        fields: the names that a row must have, and the types that their values may have.
    Raises:
        SystemExit with file, line and field: a missing file or key, a key twice, a wrong type (null
            too), bad UTF-8 or
        JSON, half a surrogate pair, no row.
    """
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
        except UnicodeDecodeError as error:
            fail(f"{where}: not UTF-8 (byte {error.start + 1} of the line)")
        except (ValueError, RecursionError) as error:
            fail(f"{where}: not JSON ({short(error)})")
        if not isinstance(row, dict):
            fail(f"{where}: expected a JSON object with {', '.join(fields)}")
        for name, kind in fields.items():
            check_field(row, name, kind, where)
        rows.append({**row, "line": number})
    if not rows:
        fail(f"{path}: empty, expected one JSON object a line with {', '.join(fields)}")
    return rows


def read_lines(path: str | Path) -> list[bytes]:
    """The lines of a file, .gz or .xz, without a byte-order mark."""
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(Path(path).suffix, open)
    try:
        with opened(path, "rb") as file:
            return file.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        fail(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object; one that has a key twice is refused, as one of its two values would be
    lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def check_field(row: dict, name: str, kind: type | tuple[type, ...], where: str) -> None:
    """Stop unless the row has the field and its value is of this kind."""
    if name not in row:
        fail(f"{where}: no field {name!r} (found: {short(', '.join(row)) or 'none'})")
    value = row[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, float)):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(k.__name__ for k in kinds)
        fail(f"{where}: field {name!r} is {json.dumps(value)[:40]}, expected {names}")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        fail(f"{where}: field {name!r} has half a surrogate pair in it, which is no character")


def sha256(path: str | Path) -> str:
    """Hex digits of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- one process a folder ------------------------------------------------------------------------

# folder -> its open descriptor; the system lets go of it when this process ends
_locked: dict[Path, int] = {}


def lock(folder: Path) -> None:
    """Keep every other process out of a folder until this one ends or unlocks it.

    The lock is the system's own, on the folder itself: it leaves no file behind, and a process that
    was killed holds none.
    """
    folder = folder.resolve()
    if fcntl is None or RANK > 0 or folder in _locked:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        fail(f"{folder}: another process is writing there; wait for it, or give another folder "
             "with --out")
    _locked[folder] = descriptor


def unlock(folder: Path) -> None:
    if (descriptor := _locked.pop(folder.resolve(), None)) is not None:
        os.close(descriptor)
