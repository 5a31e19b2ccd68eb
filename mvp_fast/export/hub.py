"""Uploading an export to a model hub with huggingface_hub; nothing here runs unless it is asked for by name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mvp_fast.errors import ConfigError, EnvironmentProblem

_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write"


def check_target(repo_id: str) -> None:
    """Before anything is written: a name that a hub can have, and a token to log in with.

    Raises:
        ConfigError: `repo_id` is not OWNER/NAME.
        EnvironmentProblem: there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError(f"'{repo_id}' is not of the form OWNER/NAME")
    except HFValidationError as error:
        raise ConfigError(
            f"There can be no such repository: {str(error).strip()}", where=f"--push {repo_id}", fix="Give OWNER/NAME"
        ) from error
    if get_token() is None:
        raise EnvironmentProblem("There is no token to upload with", where=f"--push {repo_id}", fix=_LOG_IN)


def push(folder: Path, names: Sequence[str], repo_id: str, *, private: bool = False, message: str) -> str:
    """Create the repository where it is missing and upload files to it, in one commit.

    Args:
        folder: that the files lie in.
        names: the files; nothing else in the folder is uploaded.
        repo_id: OWNER/NAME.
        private: a new repository is private, and one that is public is refused.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        ConfigError: the repository is public and must not be, or the hub refuses the card.
        EnvironmentProblem: no network, no rights, or anything else that the hub answers.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(library_name="mvp_fast")
    try:
        address = api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ConfigError(
                "The repository is there already, and public",
                where=f"--push {repo_id}",
                fix="Make it private in its settings, take another name, or leave --private out",
            )
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(names), commit_message=message)
    except ConfigError:
        raise
    except Exception as error:  # every transport raises errors of its own
        raise _refusal(error, folder, repo_id, api.endpoint) from error
    return str(address)


def _refusal(error: Exception, folder: Path, repo_id: str, endpoint: str) -> ConfigError | EnvironmentProblem:
    """What went wrong, in words: the hub's answer, or that there was none."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    answer = getattr(error, "server_message", None) or str(error).strip() or type(error).__name__
    line = answer.splitlines()[0].rstrip(".")
    again = f"The export in {folder} is whole: the same command tries again"
    if "Invalid metadata in README.md" in str(error):
        told = " ".join(str(error).split())
        return ConfigError(f"The hub refuses the model card: {told}", where=repo_id, fix="Give a --license it knows")
    if status == 401:
        what, fix = f"The hub does not accept the token: {line}", _LOG_IN
    elif status == 403:
        what, fix = f"The token may not write to {repo_id}: {line}", f"{_LOG_IN} there, or take an OWNER of your own"
    elif status == 404:
        what, fix = f"The hub has no such owner or repository: {line}", "Check OWNER/NAME and the token's rights"
    elif status is not None:
        what, fix = f"The hub answered with an error {status}: {line}", "Try again later"
    else:
        what, fix = (
            f"The upload failed: {line}",
            "Check the network (HF_ENDPOINT and HF_HUB_OFFLINE, where they are set)",
        )
    return EnvironmentProblem(what, where=f"{repo_id} at {endpoint}", fix=f"{fix}. {again}")
