"""Files of the Hugging Face hub, by the package huggingface_hub: read from its cache, or fetched
into it.

Whether the network may be asked (HF_HUB_OFFLINE), who asks (HF_TOKEN, `hf auth login`), and where
(HF_ENDPOINT, HF_HOME, proxies) is between that package and its user. Here its errors become
sentences.
"""

import contextlib
from pathlib import Path

from data.errors import UserError

class NobodyAnswers(UserError):
    """A file that is not in the cache, where the hub cannot be asked whether it has one."""


_commit_of = {}             # {repository: the commit that its first file came from}


def fetch(repo, filename):                                      # -> Path | None
    """The path of a repository's file in the cache, fetched if need be; None if the repository has
    no such file.

    All files of a repository come from the commit at which its branch main stood when the first
    was asked for. Raises UserError for a repository that is not there, wants permission, or cannot
    be reached (then it is NobodyAnswers).
    """
    from_hub = import_hub(f"{repo} on the Hugging Face hub")
    with sentences(repo, filename):
        try:
            path = Path(from_hub.hf_hub_download(repo, filename, revision=_commit_of.get(repo)))
        except from_hub.utils.LocalEntryNotFoundError:          # a kind of the next, on which the
            raise                                               # hub did not say that it has none
        except from_hub.utils.EntryNotFoundError:
            return None
    depth = filename.count("/")
    _commit_of[repo] = path.parents[depth].name                 # .../snapshots/<commit>/<filename>
    return path


def cached(repo, filename):                                     # -> Path | None
    """The path of a repository's file if it is in the cache, without asking anybody."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    path = try_to_load_from_cache(repo, filename)
    return Path(path) if isinstance(path, str) else None


class Stream:
    """A file of the hub, read from beginning to end without being stored: `read` and `close`.

    path: "datasets/<owner>/<name>/<file>". Whatever goes wrong on the way is a UserError.
    """

    def __init__(self, path):
        from_hub = import_hub(f"{path} on the Hugging Face hub")
        _, owner, name, self.filename = path.split("/", 3)
        self.repo = f"{owner}/{name}"
        with sentences(self.repo, self.filename, "--repo-type dataset "):
            # It is fetched in ranges. (As one answer, huggingface_hub before 0.33 begins anew at
            # the file's end.)
            self.file = from_hub.HfFileSystem().open(path, "rb")

    def read(self, n=-1):
        with sentences(self.repo, self.filename, "--repo-type dataset "):
            return self.file.read(n)

    def close(self):
        self.file.close()


def import_hub(what):
    """The package huggingface_hub. Raises UserError where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.utils
    except ImportError:
        raise UserError(f"{what} takes one more package: pip install huggingface_hub.") from None
    return huggingface_hub


@contextlib.contextmanager
def sentences(repo, filename, kind=""):
    """A block in which what huggingface_hub and its HTTP library raise becomes a UserError."""
    from huggingface_hub.utils import (GatedRepoError, HFValidationError, LocalEntryNotFoundError,
                                       RepositoryNotFoundError)
    hint = f"fetch it where there is a way, with: hf download {kind}{repo} {filename}"
    try:
        yield
    except GatedRepoError as error:
        raise UserError(f"{repo} is given out under a licence; accept it on the page of {repo} on "
                        f"the hub, and set HF_TOKEN to your access token.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no {repo}, or shows it to its members only; check the name, "
                        f"or set HF_TOKEN to an access token.") from error
    except HFValidationError as error:
        raise UserError(f"{repo} is no name on the Hugging Face hub; there it is owner/name."
                        ) from error
    except LocalEntryNotFoundError as error:
        raise NobodyAnswers(f"{repo}: {filename} is not in the cache of the Hugging Face hub, and "
                            f"cannot be fetched ({reason(error)}); connect to the internet, or "
                            f"{hint}.") from error
    except Exception as error:      # of the HTTP library, of which there has been more than one
        raise UserError(f"{repo}: {filename} cannot be fetched ({reason(error)}); try again, or "
                        f"{hint}.") from error


def reason(error):
    """What went wrong, in a word or two. (Messages of the package are long, and advise the
    programmer.)"""
    error = error.__cause__ or error
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code}"
    return getattr(error, "strerror", None) or type(error).__name__
