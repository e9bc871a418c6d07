"""Files of the Hugging Face hub by plain HTTPS: read from its cache, or fetched into it, whole or
not at all.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_CACHE mean what they mean to `hf`; a token that `hf auth
login` has stored in a file is not read. The token goes to the endpoint's own host and to no other,
wherever a redirect leads. A file is checked against the size and the checksum that the server
states, and takes its name in the cache only when it is whole.
"""

import contextlib
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from data.errors import UserError
from data.files import atomic
from data.progress import Progress

CHUNK = 2**20               # bytes read at a time
TIMEOUT = 30                # seconds without a byte


def cached(repo, filename):
    """The path of a repository's file in the Hugging Face cache (its branch main), or None."""
    path = _repo_folder(repo) / "snapshots" / _commit(repo) / filename
    return path if _commit(repo) and path.is_file() else None


def fetch(repo, filename):
    """Download a repository's file into the cache -> its path there; None if the repository has no
    such file.

    Further files come from the same commit as the first. Raises UserError if the host cannot be
    reached, refuses, or sends other bytes than it states.
    """
    hint = f"or fetch it once with: hf download {repo} {filename}"
    url = f"{endpoint()}/{repo}/resolve/{_commit(repo) or 'main'}/{filename}"
    with open_url(url, hint) as response:
        if response is None:
            return None
        commit = response.facts.get("x-repo-commit", "")
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise UserError(f"{endpoint()} does not answer as the Hugging Face hub does "
                            f"(X-Repo-Commit is missing); check HF_ENDPOINT, {hint}.")
        path = _repo_folder(repo) / "snapshots" / commit / filename
        with atomic(path, "set HF_HOME to a folder with room") as temporary:
            _copy(response, temporary, filename, hint)
    if not _commit(repo):
        branch = _repo_folder(repo) / "refs" / "main"
        with atomic(branch, "set HF_HOME to a folder with room") as temporary:
            temporary.write_text(commit)
    return path


@contextlib.contextmanager
def open_url(url, hint="or check the address"):
    """A GET whose answer is read like a file; yields None where there is no such file (404).

    Redirects are followed. `.facts` are the headers, names in lower case; those that start with x-
    are kept from the first host, so that what the hub says of a file holds when another delivers
    it. Whatever goes wrong on the network, until the file is closed, is a UserError.
    """
    facts, url, token = {}, _checked(url), os.environ.get("HF_TOKEN")
    home = urlsplit(_checked(endpoint()))[:2]
    try:
        for _ in range(8):
            request = urllib.request.Request(url, headers={"User-Agent": "attention-output-saes"})
            if token and urlsplit(url)[:2] == home:
                request.add_header("Authorization", f"Bearer {token}")
            try:
                response = _opener.open(request, timeout=TIMEOUT)
            except urllib.error.HTTPError as error:
                response = error
            with response:
                said = {name: value for name, value in facts.items() if name.startswith("x-")}
                facts = {name.lower(): value for name, value in response.headers.items()} | said
                if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                    url = _checked(response.headers["Location"], base=url)
                    continue
                if response.status in (401, 403):
                    raise UserError(f"{url} wants permission (HTTP {response.status}); accept the "
                                    "licence on its page and set HF_TOKEN to your access token, "
                                    f"{hint}.")
                if response.status not in (200, 404):
                    raise UserError(f"{url} answered HTTP {response.status}; try again later, "
                                    f"{hint}.")
                response.facts = facts
                yield response if response.status == 200 else None
                return
        raise UserError(f"{url} redirects without end; check HF_ENDPOINT, {hint}.")
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError,
            TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{url} cannot be reached, or broke off ({reason}); connect to the "
                        f"internet, {hint}.") from error


def _checked(url, base=""):
    """An address, relative to `base`, with other than ASCII letters in percent signs. Raises
    UserError if it is none."""
    with contextlib.suppress(ValueError):
        url = urljoin(base, url)
        if urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname:
            return quote(url, safe=":/?#[]@!$&'()*+,;=%~")
    raise UserError(f"{url} is not an address; give one that starts with https://.")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects come back as answers: open_url follows them, and decides who sees the token."""

    def http_error_302(self, *args):
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


_opener = urllib.request.build_opener(_NoRedirects)


def _copy(response, path, name, hint):
    """Write the answer's bytes to `path` and check them against what the server said of them.

    The checksum is SHA-256 for large files; for small ones it is git's, SHA-1 of a header and the
    bytes.
    """
    size = response.facts.get("x-linked-size") or response.facts.get("content-length") or ""
    size = int(size) if size.isdecimal() else -1            # -1: the server does not say
    stated = response.facts.get("x-linked-etag") or response.facts.get("etag", "")
    stated = stated.removeprefix("W/").strip('"')
    digests = {64: hashlib.sha256()}
    if size >= 0:
        digests[40] = hashlib.sha1(b"blob %d\0" % size)
    progress, done = Progress(size, f"bytes of {name}"), 0
    with open(path, "wb") as file:
        while chunk := _read(response, name, hint):
            file.write(chunk)
            done += len(chunk)
            for digest in digests.values():
                digest.update(chunk)
            if size > 10 * CHUNK:
                progress(done)
    if size >= 0 and done != size:
        raise UserError(f"{name} broke off after {done:,} of {size:,} bytes; try again, {hint}.")
    if len(stated) in digests and digests[len(stated)].hexdigest() != stated:
        raise UserError(f"{name} arrived damaged: its checksum is not the one the server states; "
                        f"try again, {hint}.")


def _read(response, name, hint):
    """The next bytes; a network error is told from one of the disk, which comes as OSError too."""
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{name} broke off ({error}); try again, {hint}.") from error


def endpoint():
    """The hub's address: HF_ENDPOINT, or huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _repo_folder(repo):
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    home = os.environ.get("HF_HOME") or caches / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    return cache / f"models--{repo.replace('/', '--')}"


def _commit(repo):
    """The commit that branch main stands at in the cache, or "" if nothing of the repository is
    there."""
    refs = _repo_folder(repo) / "refs" / "main"
    return refs.read_text().strip() if refs.is_file() else ""
