"""Publishing on the Hub: a folder that has been checked, compared with what is there, sent as one commit."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd
from huggingface_hub import errors as hub

from .. import __version__
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..utils.hub import ATTEMPTS, CONFIG, is_busy, listed, pause
from .model_card import Publisher
from .publication import Publication, publish_run, publish_sae
from .repository import REQUEST_ERRORS, SIGNATURE, RepoKind, Repository, cause_of, check_repo_id, content_hash
from .run_folder import FinishedRun

logger = logging.getLogger(__name__)

MESSAGE = "Upload SAE with hf_selortho"
_NOT_OURS = {".gitattributes"}  # the Hub writes it


_NOBODY = Publisher()


@dataclass(frozen=True)
class Pushed:
    """What a push has come to."""

    repo_id: str
    url: str  # of the commit, or of the pull request
    commit: str | None  # that holds the files now; of a pull request, None
    changed: tuple[str, ...]  # files that were sent; none if everything was there already
    left: tuple[str, ...] = ()  # files of the repository that are not part of what was pushed

    @property
    def in_words(self) -> str:
        """One line for the screen."""
        if not self.changed:
            return f"{self.repo_id} has all of this already: nothing was sent ({self.url})"
        return f"{len(self.changed)} files sent to {self.repo_id}, in one commit: {self.url}"


class _Made(NamedTuple):
    """A commit, or a pull request, of which no commit is known."""

    url: str
    commit: str | None


def push_run(
    run: FinishedRun,
    repo_id: str,
    *,
    publisher: Publisher = _NOBODY,
    template: str | os.PathLike[str] | None = None,
    include_index: bool = False,
    **options: Any,
) -> Pushed:
    """Publish the SAEs of a run; see [`publish_run`] for what, and [`push_folder`] for the options and errors."""
    publisher = Publisher(repo_id, publisher.license, publisher.license_link, publisher.saelens)
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="hf_selortho-push-") as folder:
        publication = publish_run(run, Path(folder), publisher, template, include_index)
        return push_publication(publication, repo_id, **options)


def push_sae(
    sae: SelOrthoSAE,
    repo_id: str,
    *,
    license: str | None = None,
    license_link: str | None = None,
    saelens: bool = True,
    template: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Pushed:
    """Publish an SAE by itself, without evaluation; see [`push_folder`] for the options and errors."""
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory(prefix="hf_selortho-push-") as folder:
        publication = publish_sae(sae, Path(folder), Publisher(repo_id, license, license_link, saelens), template)
        return push_publication(publication, repo_id, **options)


def push_publication(publication: Publication, repo_id: str, **options: Any) -> Pushed:
    """[`push_folder`] of a publication, but never into the repository of another kind of model."""
    return push_folder(publication.folder, repo_id, check=_refuse_other_models, **options)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    kind: RepoKind = "model",
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    check: Callable[[Repository, Mapping[str, str]], None] | None = None,
    **repository: Any,
) -> Pushed:
    """Make a repository hold the files of a folder, by one commit or none.

    Only what differs is sent; large files that arrived before an earlier push broke off are not sent again. Nothing of
    the repository is removed.

    Args:
        folder: what the repository shall hold, file by file.
        repo_id: "owner/name"; it is created if there is none.
        kind: model, dataset or space.
        private: whether a new repository is private; None: as its owner has set it.
        revision: branch to commit to, created if there is none.
        create_pr: propose the change instead of making it.
        overwrite: replace files that somebody else has changed since the last push.
        commit_message: title of the commit.
        token: access token; without it, the stored one or HF_TOKEN.
        check: is shown the repository and its files, and raises if it is not to be written to.
        repository: further arguments for a new repository, such as `space_sdk`.

    Raises:
        SelOrthoError: the Hub refuses or cannot be reached, or somebody else has changed what would be overwritten. The
            repository is then as it was.
    """
    check_repo_id(repo_id)
    place = Repository(repo_id, kind, revision, token)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    place.create(private, create_pr, **repository)
    head = place.head()
    there = place.files(head)
    if check is not None:
        check(place, there)
    changed = [name for name, path in files.items() if there.get(name) != content_hash(path, len(there.get(name, "")))]
    left = tuple(sorted(there.keys() - files.keys() - _NOT_OURS))
    if not changed:
        return Pushed(repo_id, place.url_of(head), head, (), left)
    if not overwrite and not create_pr:
        _refuse_others_changes(place, head, there, changed)
    title = commit_message or MESSAGE
    if create_pr and (earlier := place.same_proposal(title, {name: files[name] for name in files})):
        return Pushed(repo_id, earlier, None, (), left)
    made = _commit(place, {name: files[name] for name in changed}, title, head, create_pr)
    return Pushed(repo_id, made.url, made.commit, tuple(changed), left)


def _commit(place: Repository, files: Mapping[str, Path], title: str, head: str, create_pr: bool) -> _Made:
    """Send the files as one commit on top of `head`; if its answer is lost, look whether it was made."""
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    for attempt in range(ATTEMPTS):
        try:
            with warnings.catch_warnings():  # a feature index is parquet, and belongs beside its SAE
                warnings.filterwarnings("ignore", message=".*commit a data file.*")
                info = place.api.create_commit(
                    place.repo_id,
                    operations,
                    commit_message=title,
                    commit_description=f"{SIGNATURE} {__version__}",
                    revision=place.revision,
                    repo_type=place.kind,
                    create_pr=create_pr,
                    parent_commit=head,
                )
            return _Made(str(info.pr_url), None) if create_pr else _Made(str(info.commit_url), info.oid)
        except REQUEST_ERRORS as failure:
            error = cause_of(failure)
            if made := _made_nevertheless(place, files, title, head, create_pr, error):
                return made
            refused = isinstance(error, hub.HfHubHTTPError | ValueError) and not is_busy(error)
            if attempt == ATTEMPTS - 1 or refused:
                raise place.refusal(error) from error
            pause(attempt, error)
    raise AssertionError("the last attempt returns or raises")


def _made_nevertheless(
    place: Repository, files: Mapping[str, Path], title: str, head: str, create_pr: bool, error: Exception
) -> _Made | None:
    """The commit, if the Hub has made it although an error came back.

    Raises:
        SelOrthoError: somebody else has committed in between.
    """
    if isinstance(error, hub.HfHubHTTPError) and error.response.status_code in (400, 401, 403, 404):
        return None
    try:
        if create_pr:
            url = place.same_proposal(title, files)
            return None if url is None else _Made(url, None)
        now = place.head()
        if now == head:
            return None
        there = place.files(now)
    except SelOrthoError:
        return None
    if all(there.get(name) == content_hash(path, len(there.get(name, ""))) for name, path in files.items()):
        return _Made(place.url_of(now), now)
    raise SelOrthoError(
        f"somebody else has pushed to {place.repo_id} at the same time ({now[:12]} came after {head[:12]}), so nothing "
        "was pushed: look at that commit, then run the same command again"
    ) from error


def _refuse_others_changes(place: Repository, head: str, there: Mapping[str, str], changed: Sequence[str]) -> None:
    """Raise if files that would be overwritten are not as our last push has left them.

    In a repository that we have never pushed to, what it was created with may go, such as a card without text.
    """
    overwritten = [name for name in changed if name in there]
    if not overwritten:
        return
    base, is_ours = place.since(head)
    if base in (None, head):
        return
    before = place.files(str(base))
    others = [name for name in overwritten if before.get(name) != there[name]]
    if others:
        raise SelOrthoError(
            f"somebody else has changed {listed(others)} of {place.repo_id} since "
            f"{'the last push' if is_ours else 'it was created'}, so nothing was pushed: look at those changes, then "
            "pass --overwrite (overwrite=True) to replace them, or --create_pr to propose yours"
        )


def _refuse_other_models(place: Repository, there: Mapping[str, str]) -> None:
    """Raise if the repository is that of another kind of model."""
    if CONFIG not in there:
        return
    try:
        kind = place.config(place.head()).get("model_type")
    except SelOrthoError:  # not JSON: nobody's model
        return
    if kind != SelOrthoSAE.config_class.model_type:
        raise SelOrthoError(
            f"{place.repo_id} holds another kind of model (model_type {kind!r}), so nothing was pushed: choose another "
            "--repo_id"
        )
