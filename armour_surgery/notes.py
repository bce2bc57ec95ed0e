"""The one category of this package's warnings: what a user has to know of something that went well."""

__all__ = ["ArmourWarning"]


class ArmourWarning(UserWarning):
    """Something was chosen on the user's behalf. Python shows it as a warning, the commands as one line on stderr."""
