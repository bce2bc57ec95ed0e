"""Plans of calibrated conversions, made by hand."""

from armour_surgery.records import Fidelity, SitePlan, SurgeryPlan

__all__ = ["calibrated_plan", "calibrated_site"]


def calibrated_site(number: int, residual: float | None) -> SitePlan:
    return SitePlan(f"blocks.{number}.attn", "qv", "calibrated", 53, 39, 710, 530, residual, "x", ("joint-svd", "last"))


def calibrated_plan(*residuals: float | None) -> SurgeryPlan:
    sites = tuple(calibrated_site(number, residual) for number, residual in enumerate(residuals))
    fidelity = Fidelity(41, "photos", 0.97124, 13.46, 96.75)
    return SurgeryPlan("qv", "calibrated", sites, (), 1_000_000, 900_000, 700, 600, fidelity=fidelity)
