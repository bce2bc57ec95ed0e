"""Ready a model for inference: `deploy`, and the names of its passes."""

from armour_surgery.deployment.pipeline import PASSES, deploy

__all__ = ["PASSES", "deploy"]
