"""Choose the weights of a converted model so that it keeps working: from its weights alone, or from images too."""

from armour_surgery.initialize.batches import HELD_OUT
from armour_surgery.initialize.calibrate import calibrate
from armour_surgery.initialize.from_weights import from_weights
from armour_surgery.initialize.hidden import STEP, MlpProblem
from armour_surgery.initialize.problem import Problem
from armour_surgery.initialize.reconstruct import reconstruct
from armour_surgery.initialize.site import SiteResult

__all__ = ["HELD_OUT", "STEP", "MlpProblem", "Problem", "SiteResult", "calibrate", "from_weights", "reconstruct"]
