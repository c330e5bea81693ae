"""The model that a run began from, to be evaluated beside its policies."""

from prefopt.config.schema import ModelConfig
from prefopt.errors import UserError
from prefopt.models.fingerprint import model_files
from prefopt.tracking.record import record_of


def initial_model(run: str) -> ModelConfig:
    """The model that the run in this folder began from.

    Raises UserError where its files have changed since.
    """
    record = record_of(run)
    model, recorded = ModelConfig(**record["config"]["model"]), record.get("model", {})
    changed = [part for part, value in model_files(model).items() if recorded.get(f"its {part}", value) != value]
    if changed:
        raise UserError(
            f"{model.path} is not the model any more that run={run} began from (changed: its {', its '.join(changed)})."
            " Bring the old files back."
        )
    return model


def initial_weights(run: str) -> str | None:
    """The digest of the float32 weights of `initial_model`, as the run recorded it. None where the run began from
    others: rounded to 4 bits, or with the head of a reward model; or from an adapter, whose sum with the weights is not
    the same to the last bit on all machines."""
    record = record_of(run)
    config = record["config"]
    quantized, adapter = (config.get("peft") or {}).get("quantize"), config["model"].get("adapter")
    if quantized or adapter or config["objective"].get("_target_", "").endswith(".Reward"):
        return None
    return record.get("initial_weights")
