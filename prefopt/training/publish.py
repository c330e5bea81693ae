"""The policy of a finished run, put on the hub."""

import logging
from pathlib import Path

from prefopt.errors import UserError

log = logging.getLogger(__name__)


def check_push(name: str | None) -> None:
    """Raise UserError where a policy cannot be put on the hub as `name`, OWNER/NAME: a name that is none, no token, no
    network. None: nothing is put there."""
    if name is None:
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"push_to_hub={name} is no name on the hub: {error}") from None
    if "/" not in name:
        raise UserError(f"push_to_hub={name} needs its owner, you or an organization: push_to_hub=OWNER/{name}")
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "push_to_hub needs the network, and HF_HUB_OFFLINE is set: unset it, or upload the policy later."
        )
    if not get_token():
        raise UserError("push_to_hub needs a token that may write: run `hf auth login`, or set HF_TOKEN.")


def refuse_push_of_sweep(name: str | None) -> None:
    """Raise UserError where the runs of a sweep would overwrite each other on the hub."""
    if name is not None:
        raise UserError(
            "push_to_hub: the runs of a sweep would all go by one name. Leave it out, and upload those you choose: "
            "hf upload OWNER/NAME runs/RUN/policy . --private"
        )


def push(name: str | None, folder: Path) -> None:
    """Put the files of `folder` into the repository `name`, which is made, and private, where there is none.

    Raises UserError where the hub does not take them; nothing here is changed by that.
    """
    if name is None:
        return
    from huggingface_hub import HfApi

    from prefopt.utils.redact import redact

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message=folder.resolve().parent.name)
    except Exception as error:  # of the network, the token, the repository
        reason = redact((str(error).strip() or type(error).__name__).splitlines()[0])
        raise UserError(
            f"the run is finished, and its policy is in {folder}, but not on the hub: {reason}\nThe same command tries "
            f"again, or: hf upload {name} {folder} . --private"
        ) from None
    log.info(f"  the policy is on the hub, for you alone: {commit.commit_url}")
