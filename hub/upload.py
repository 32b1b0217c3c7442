"""Uploads a checkpoint folder to the Hub as one commit."""

from __future__ import annotations

from pathlib import Path

from wam_policy.errors import CheckpointError
from wam_policy.hub import checkpoint


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None,
    private: bool | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    """Upload a folder, remove what an older version left in the repository, and return the commit's address.

    Raises:
        CheckpointError: the Hub refuses, or can't be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            delete_patterns=list(checkpoint.STALE),
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"can't upload to {repo_id!r}: {error}; check the token's write access"
        ) from error
    return str(commit.commit_url)
