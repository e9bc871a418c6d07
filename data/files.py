"""Files written whole or not at all, JSON read with care, and where results go."""

import contextlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError

from data.errors import UserError


@contextlib.contextmanager
def atomic(path, hint="choose another --out"):
    """Yields a temporary path that takes the name `path` only when the block ends well: never half
    a file.

    Raises UserError, ending in `hint`, if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        usual_mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, usual_mode)                 # safetensors writes for the owner alone
        with open(temporary, "r+b") as file:    # Windows syncs only what can be written
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:         # on a full disk safetensors raises its own
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {path}: {reason}; {hint}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def sole_writer(folder):
    """Hold `folder` for this process while the block runs, and clear away what a killed one was
    writing there.

    Raises UserError if another process holds it. The system lets go of the lock when a process
    ends, however it ends.
    """
    try:
        import fcntl
    except ImportError:                                 # Windows: there we trust the user
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"another run is writing to {folder}; wait for it, or choose another "
                        "--out.") from None
    except OSError:
        pass                                            # a file system without locks
    try:
        for leftover in (*folder.glob(".*tmp*"), *folder.glob("L*/.*tmp*")):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(lock)                                  # which lets go of it


def run_folder(out, model):
    """Where a program writes what it finds about a model: <out>/<name of the model or of its
    directory>."""
    return Path(out) / Path(model).resolve().name


def claim(folder, model, weights):
    """Write down in a folder's model.json whose results it holds.

    Raises UserError if it holds those of another model, such as one whose directory has the same
    name. A model in the same place with other weights, in another number type or trained since,
    gets a line that says so.
    """
    path = folder / "model.json"
    place = str(Path(model).resolve()) if Path(model).is_dir() else str(model)
    if not path.is_file():
        write_json(path, {"model": place, "weights": weights})
        return
    owner = read_json(path)
    if owner.get("weights") == weights:
        return
    if owner.get("model") != place:
        raise UserError(f"{folder} holds results of another model, {owner.get('model')}; choose "
                        f"another --out.")
    print(f"note: {folder} also holds results of other weights of this model, in another number "
          f"type or from before it was trained on")


def check_writable(folder):
    """Make the folder. Raises UserError now, rather than in an hour, if nothing can be written to
    it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}.tmp"     # its own, should several processes try
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another "
                        f"--out.") from error


def write_text(path, text):
    """Put a text into a file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf8")


def write_json(path, value):
    """Plain numbers and lists as JSON, written atomically. NaN is refused, since it is not JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def parse_json(text):
    """The value of a JSON text. Raises ValueError if it is none, or is nested too deeply to be
    read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path):
    """The JSON object in `path`. Raises UserError if the file is missing or is not JSON."""
    try:
        value = parse_json(Path(path).read_text(encoding="utf8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); it may be cut short: fetch or make "
                        "it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object, and holds a {type(value).__name__}.")
    return value
