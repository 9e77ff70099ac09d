"""Ask a repository of the Hub, as somebody who wants to write to it; translate refusals into one-line messages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from huggingface_hub import HfApi
from huggingface_hub import errors as hub
from huggingface_hub.hf_api import RepoFile

from ..errors import SelOrthoError
from ..utils.files import sha256_of
from ..utils.hub import LOOKUP_ERRORS, patiently
from ..utils.library_errors import no_answer, one_line, storage_error

RepoKind: TypeAlias = Literal["model", "dataset", "space"]
T = TypeVar("T")

SIGNATURE = "Pushed by hf_selortho"  # in the message of a commit: by it our own are known again
_LOOKED_BACK = 200  # commits in which the last of ours is looked for


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub at a branch, with errors a person can act on."""

    repo_id: str
    kind: RepoKind = "model"
    revision: str | None = None
    token: str | None = None

    @property
    def api(self) -> HfApi:
        return HfApi(token=self.token)

    @property
    def page(self) -> str:
        """Its address."""
        return f"{self.api.endpoint}/{'' if self.kind == 'model' else f'{self.kind}s/'}{self.repo_id}"

    def check_account(self) -> None:
        """Raise a SelOrthoError unless the access token is one of the owner, or of a member of that organisation."""
        account = self.ask(self.api.whoami)
        owner, names = self.repo_id.split("/")[0], [account.get("name"), *(o.get("name") for o in account["orgs"])]
        if owner not in names:
            raise SelOrthoError(
                f"your access token is that of {names[0]}, who does not belong to {owner!r}: choose another owner for "
                f"{self.repo_id}, or run `hf auth login` or set HF_TOKEN"
            )

    def create(self, private: bool | None, create_pr: bool, space_sdk: str | None) -> None:
        """Make sure that the repository exists, and the branch to commit to."""
        if not self.ask(lambda: self.api.repo_exists(self.repo_id, repo_type=self.kind)):
            new: dict[str, Any] = {"private": private, "repo_type": self.kind, "space_sdk": space_sdk, "exist_ok": True}
            self.ask(lambda: self.api.create_repo(self.repo_id, **new))
        if (branch := self.revision) and not create_pr:
            self.ask(lambda: self.api.create_branch(self.repo_id, branch=branch, repo_type=self.kind, exist_ok=True))

    def head(self) -> str:
        """Return the commit of the branch."""
        info = self.ask(lambda: self.api.repo_info(self.repo_id, revision=self.revision, repo_type=self.kind))
        return str(info.sha)

    def files(self, commit: str) -> dict[str, str]:
        """Return the hash of every file: sha256 of large ones, git's sha1 of the others."""
        tree = self.ask(
            lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit, repo_type=self.kind))
        )
        return {
            entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id
            for entry in tree
            if isinstance(entry, RepoFile)
        }

    def since(self, head: str) -> tuple[str, bool]:
        """Return the last commit up to `head` that this package has made, and True; else the first, and False."""
        commits = self.ask(lambda: self.api.list_repo_commits(self.repo_id, revision=head, repo_type=self.kind))
        for commit in commits[:_LOOKED_BACK]:
            if SIGNATURE in f"{commit.title}\n{commit.message}":
                return commit.commit_id, True
        return commits[-1].commit_id, False

    def same_proposal(self, title: str, files: Mapping[str, Path]) -> str | None:
        """Return the address of an open pull request of this title that holds these very files."""
        wanted: dict[str, Any] = {"discussion_type": "pull_request", "discussion_status": "open"}
        proposals = self.ask(lambda: list(self.api.get_repo_discussions(self.repo_id, repo_type=self.kind, **wanted)))
        for proposal in proposals:
            if proposal.title == title and not changed_files(files, self.files(f"refs/pr/{proposal.num}")):
                return str(proposal.url)
        return None

    def ask(self, request: Callable[[], T]) -> T:
        """Return the answer to a request.

        Raises:
            SelOrthoError: there is none, or it is no.
        """
        try:
            return patiently(request)
        except LOOKUP_ERRORS as error:
            raise self.refusal(error) from error

    def refusal(self, error: Exception) -> SelOrthoError:
        """Say what the Hub has said, and what to do about it."""
        error = cause_of(error)
        if said := storage_error(error):
            return said
        status = error.response.status_code if isinstance(error, hub.HfHubHTTPError) else None
        if status == 401:
            return SelOrthoError(
                f"the Hub does not accept your access token, or there is none, for {self.repo_id}: run `hf auth login` "
                "or set HF_TOKEN to a token that may write"
            )
        if status == 403:
            option = "--space" if self.kind == "space" else "--repo_id"
            return SelOrthoError(
                f"your access token may not write to {self.repo_id}: take one with the permission to write there, or "
                f"another {option}, or propose the change with --create_pr ({one_line(error)})"
            )
        if isinstance(error, hub.RevisionNotFoundError):
            return SelOrthoError(f"{self.repo_id} has no revision {self.revision!r}: name a branch of it")
        if status == 404:
            return SelOrthoError(
                f"there is no repository {self.repo_id} that your access token can see: check the spelling, and that "
                "its owner exists and has given you access"
            )
        if is_final(error):
            return SelOrthoError(f"the Hub refuses {self.repo_id}: {one_line(error)}")
        return SelOrthoError(
            f"the Hub cannot be reached for {self.repo_id} ({no_answer(error)}): run the same command again later; "
            "large files that have arrived are not sent again"
        )


def cause_of(error: Exception) -> Exception:
    """Return what made an upload fail."""
    cause = error.__cause__
    return cause if isinstance(error, RuntimeError) and isinstance(cause, Exception) else error


def is_final(error: Exception) -> bool:
    """Return whether asking again is of no use: all but a busy server, a broken connection, a head that has moved."""
    if isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code
        return 400 <= status < 500 and status not in (412, 429)
    return isinstance(error, ValueError)  # the client's word for metadata that the Hub does not take


def changed_files(files: Mapping[str, Path], there: Mapping[str, str]) -> list[str]:
    """Return which of the files are not in a repository with these hashes, or other ones."""
    return [name for name, path in files.items() if there.get(name) != _hash(path, len(there.get(name, "")))]


def _hash(path: Path, digits: int) -> str:
    """Hash a file as the Hub has it: sha256 if it has 64 digits, else git's sha1."""
    if digits == 64:
        return sha256_of(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
