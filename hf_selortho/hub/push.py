"""Publish on the Hub: a folder that has been checked, compared with what is there, sent as one commit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd

from .. import __version__
from ..errors import SelOrthoError
from ..modeling_selortho import SelOrthoSAE
from ..training.arguments import PublicIds
from ..training.run_folder import CARD, save_sae
from ..utils.files import temporary_folder
from ..utils.hub import ATTEMPTS, LOOKUP_ERRORS, listed, pause
from ..utils.names import repo_id as as_repo_id
from .gate import refuse_private
from .publication import files_of, publish_run
from .repository import SIGNATURE, RepoKind, Repository, cause_of, changed_files, is_final
from .run_folder import FinishedRun, read_run

MESSAGE = "Upload SAE with hf_selortho"
_CARD_OPTIONS = ("saelens", "include_index", "license", "license_link", "template")


@dataclass(frozen=True)
class Pushed:
    """What a push has come to."""

    repo_id: str
    url: str  # of the commit, or of the pull request
    commit: str | None  # that holds the files now; of a pull request, None
    changed: tuple[str, ...]  # files that were sent; none if everything was there already
    left: tuple[str, ...] = ()  # files of the repository that are not part of what was pushed

    def __str__(self) -> str:
        if not self.changed:
            return f"{self.repo_id} has all of this already: nothing was sent ({self.url})"
        return f"{len(self.changed)} files sent to {self.repo_id}, in one commit: {self.url}"


def push_run(
    run: FinishedRun, repo_id: str, *, model_id: str | None = None, dataset_id: str | None = None, **options: Any
) -> Pushed:
    """Publish the SAEs of a run.

    Args:
        run: the run.
        repo_id: "owner/name".
        model_id, dataset_id: what a local language model and text are on the Hub, "owner/name" or
            "owner/name@revision"; without them, neither they nor their folders are named.
        options: those of [`publish_run`] and [`push_folder`], which also say what errors there are.
    """
    repo_id = as_repo_id(repo_id)
    card = {key: options.pop(key) for key in _CARD_OPTIONS if key in options}
    card |= {"ids": PublicIds(model_id, dataset_id), "token": options.get("token")}
    with temporary_folder("hf_selortho-push-") as folder:
        publish_run(run, folder, repo_id, **card)
        return push_folder(folder, repo_id, **options)


def push_sae(sae: SelOrthoSAE, repo_id: str, **options: Any) -> Pushed:
    """Publish an SAE by itself, without evaluation; options and errors as [`push_run`]."""
    with temporary_folder("hf_selortho-push-") as folder:
        save_sae(sae, folder)
        return push_run(read_run(folder), repo_id, **options)


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
    space_sdk: str | None = None,
) -> Pushed:
    """Make a repository hold the files of a folder, by one commit or none.

    Only what differs is sent; large files that arrived before an earlier push broke off are not sent again. Nothing of
    the repository is removed. Where the Hub fails or somebody else commits in between, all of it is done again, from
    the comparison on: so a commit whose answer was lost is not made twice, and nobody's work is overwritten.

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
        space_sdk: of a new Space.

    Raises:
        SelOrthoError: the Hub refuses or cannot be reached, or somebody else has changed what would be overwritten. The
            repository is then as it was. A file, or the title, names this machine, its user or their folders: see
            [`refuse_private`].
    """
    repo_id = as_repo_id(repo_id, "Space" if kind == "space" else kind)
    place = Repository(repo_id, kind, revision, token)
    files, title = files_of(folder), commit_message or MESSAGE
    refuse_private(files, title)
    sent: tuple[str, ...] = ()
    place.create(private, create_pr, space_sdk)
    for attempt in range(ATTEMPTS):
        head = place.head()
        there = place.files(head)
        changed = tuple(changed_files(files, there))
        left = tuple(sorted(there.keys() - files.keys() - {".gitattributes"}))  # that one is the Hub's
        if not changed:
            return Pushed(repo_id, f"{place.page}/commit/{head}", head, sent, left)
        if create_pr and (earlier := place.same_proposal(title, files)):
            return Pushed(repo_id, earlier, None, sent, left)
        if not overwrite and not create_pr:
            _refuse_others_changes(place, head, there, changed)
        try:
            info = _commit(place, {name: files[name] for name in changed}, title, head, create_pr)
        except LOOKUP_ERRORS as failure:
            sent, error = changed, cause_of(failure)
            if attempt == ATTEMPTS - 1 or is_final(error):
                raise place.refusal(error) from error
            pause(attempt, error)
            continue
        url, commit = (info.pr_url, None) if create_pr else (info.commit_url, info.oid)
        return Pushed(repo_id, str(url), commit, changed, left)
    raise AssertionError("the last attempt returns or raises")


def _commit(place: Repository, files: Mapping[str, Path], title: str, head: str, create_pr: bool) -> Any:
    """Send the files as one commit on top of `head`."""
    with warnings.catch_warnings():  # a feature index is parquet, and belongs beside its SAE
        warnings.filterwarnings("ignore", message=".*commit a data file.*")
        return place.api.create_commit(
            place.repo_id,
            [CommitOperationAdd(name, path) for name, path in files.items()],
            commit_message=title,
            commit_description=f"{SIGNATURE} {__version__}",
            revision=place.revision,
            repo_type=place.kind,
            create_pr=create_pr,
            parent_commit=head,
        )


def _refuse_others_changes(place: Repository, head: str, there: Mapping[str, str], changed: Sequence[str]) -> None:
    """Raise if files that would be overwritten are not as our last push has left them.

    In a repository that was never pushed to, only the card that it was created with may be replaced.
    """
    overwritten = [name for name in changed if name in there]
    if not overwritten:
        return
    base, is_ours = place.since(head)
    before = there if base == head else place.files(base)
    others = [name for name in overwritten if before.get(name) != there[name] or not (is_ours or name == CARD)]
    if others:
        raise SelOrthoError(
            f"somebody else has changed {listed(others)} of {place.repo_id} since "
            f"{'the last push' if is_ours else 'it was created'}, so nothing was pushed: look at those changes, then "
            "pass --overwrite (overwrite=True) to replace them, or --create_pr to propose yours"
        )
