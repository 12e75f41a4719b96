"""Files: written whole or not at all, and read with one clear line where something is wrong."""
from __future__ import annotations

import hashlib
import json
import lzma
import os
import typing
from pathlib import Path
from typing import Any, Callable

from common import fail


def atomic_write(path: str | Path, content: bytes | Callable[[Any], None], keep: Path | None = None) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old file or the new one and nothing between.

    Args:
        content: the bytes, or a function that writes them to an open binary file.
        keep: where the file that was there before is moved to, just before the new one takes its place.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # on a full disk, torch.save makes a RuntimeError out of the OSError
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        fail(f"{path}: cannot be written ({reason.strerror})")
    finally:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None


def write_json(path: str | Path, value: Any) -> None:
    atomic_write(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        fail(f"{path}: no such file")
    except ValueError as error:
        fail(f"{path}: not JSON ({error})")


def write_jsonl(path: str | Path, rows: typing.Iterable[dict]) -> None:
    """One JSON object a line, UTF-8, readable as it is."""
    def write(file: typing.BinaryIO) -> None:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    atomic_write(path, write)


def read_jsonl(path: str | Path, fields: dict[str, type | tuple[type, ...]]) -> list[dict]:
    """Rows of a JSON-lines file (or .xz), each checked: `fields` maps the names a row must have to the types they may have.

    Raises SystemExit with file, line and field: a missing file or key, a wrong type (null too), bad UTF-8 or JSON, no row.
    """
    rows = []
    try:
        with (lzma.open if Path(path).suffix == ".xz" else open)(path, "rb") as file:
            lines = file.read().split(b"\n")
    except (OSError, EOFError, lzma.LZMAError) as error:
        fail(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            fail(f"{path}, line {number}: not UTF-8 (byte {error.start + 1} of the line)")
        except (ValueError, RecursionError) as error:
            fail(f"{path}, line {number}: not JSON ({error})")
        if not isinstance(row, dict):
            fail(f"{path}, line {number}: expected a JSON object with {', '.join(fields)}")
        for name, kind in fields.items():
            if name not in row:
                fail(f"{path}, line {number}: no field {name!r} (found: {', '.join(row) or 'none'})")
            if not isinstance(row[name], kind):
                names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                fail(f"{path}, line {number}: field {name!r} is {json.dumps(row[name])[:40]}, expected {names}")
        rows.append({**row, "line": number})
    if not rows:
        fail(f"{path}: empty, expected one JSON object a line with {', '.join(fields)}")
    return rows


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
