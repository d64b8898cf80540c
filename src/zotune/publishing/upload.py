"""Files of a run into a repository of the Hugging Face Hub: :func:`upload`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from zotune.publishing.files import PublishedFiles

#: What a response of the hub means here.
_REASONS = {
    401: "the token is missing or wrong: run `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "the token may not write there: use one with write access, or a repository of your own",
    404: "there is no such user or organization for this token: check the name",
}


@dataclass
class Upload:
    """Where files go.

    Attributes:
        repo: `user/name` or `organization/name`.
        private: of a repository that does not exist yet.
        revision: the branch; None: the default one.
        token: None: of `hf auth login` or HF_TOKEN.
        address: of the repository, once it is there.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    token: str | None = None
    address: str | None = None

    def create(self) -> str:
        """Creates the repository where it does not exist; its address. Fails early where a later upload would; asks the hub once.

        Raises:
            ValueError: the hub refuses, the name is none, or it cannot be reached.
        """
        if self.address is not None:
            return self.address
        api = HfApi(token=self.token)
        try:
            found = api.create_repo(self.repo, private=self.private or None, exist_ok=True)
            if self.revision is not None:
                api.create_branch(found.repo_id, branch=self.revision, exist_ok=True)
        except _FAULTS as error:
            raise ValueError(self.explained(error)) from error
        self.repo, self.address = found.repo_id, str(found)  # with the user's name
        return self.address

    def explained(self, error: Exception) -> str:
        """Why the hub took nothing, and what can be done, in one sentence."""
        if isinstance(error, HFValidationError):
            return f"{self.repo!r} is no name of a repository: give user/name, of letters, digits, '-', '_' and '.'."
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE=1 keeps the hub out of reach: unset it to push."
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if isinstance(error, LocalTokenNotFoundError):
            status = 401
        reason = _REASONS.get(status or 0, f"{' '.join(str(error).split()) or type(error).__name__}")
        return f"{self.repo} was not pushed: {reason.rstrip('.')}."


_FAULTS = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError)


def upload(files: PublishedFiles, to: Upload, message: str) -> str:
    """Pushes all files of a run in one commit: the repository has all of them or none.

    Returns:
        The commit's address.

    Raises:
        ValueError: the hub refuses, or cannot be reached; the sentence says what can be done.
    """
    to.create()
    added = [CommitOperationAdd(_name(path, files.folder), path) for path in files.paths]
    try:
        return str(HfApi(token=to.token).create_commit(to.repo, added, commit_message=message, revision=to.revision).commit_url)
    except _FAULTS as error:
        raise ValueError(to.explained(error)) from error


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
