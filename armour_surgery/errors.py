"""Every error this package raises on purpose.

```
ArmourError                    exit code 1
├── UsageError                 a wrong option or argument (exit code 2)
├── ModelError                 MODEL could not be turned into a model
│   ├── UnknownModelError      no library knows the name
│   ├── HubUnreachableError    weights or config are not here and the hub did not answer
│   └── CheckpointError        a weights file is unreadable, unsafe or belongs to another architecture
├── DiscoveryError             the model could not be examined
│   ├── ExampleInputError      nobody knows what to feed the model, or it failed on what it was fed
│   └── NoAttentionError       the model ran, and nothing in it is attention
├── TraceError                 one attention module could not be followed (becomes a refusal reason)
├── ConversionError            the model was examined and cannot be converted as asked
│   ├── NothingToConvertError  no site fits the mode
│   ├── PatternError           an include/exclude pattern matches no site
│   ├── AlreadyConvertedError  the model went through surgery before
│   ├── AlreadyDeployedError   the model went through `deploy` before, which comes last
│   ├── NothingToDeployError   no pass of `deploy` found anything to do
│   ├── NotFiniteError         a weight of a site to be converted is NaN, infinite or enormous
│   ├── CalibrationError       the images to calibrate with are missing, unreadable or of another kind
│   └── PostconditionError     a pass did not keep its promise (a bug: please report it)
├── TrainingError              training or evaluating cannot start, go on, or end well
│   ├── DataError              images or labels are missing, unreadable, or not what the model takes
│   ├── TeacherError           nobody knows the teacher, or it does not fit the student
│   ├── DivergedError          the loss is no number any more
│   ├── ResumeError            there is no checkpoint to go on from, or it belongs to another run
│   └── InterruptedRunError    a signal stopped the run; a checkpoint was written
├── BenchmarkError             a model does not compile or run as it is to be timed
├── ExportError                a format cannot hold the model, or what it holds computes something else
├── SpecializationError        a converted attention was called in a way it cannot follow
├── PushError                  a saved folder was not sent to the hub
│   ├── LicenseError           the model card does not name the license of the base model
│   ├── TokenError             there is no token for the hub, or it may not write there
│   └── HubOutageError         the hub did not answer, or stopped in the middle; the same command goes on
└── FolderError                a saved folder cannot be written or read
    ├── NotOursError           --out exists and was not written by this tool
    ├── OccupiedError          --out holds a trained model, or another one, which is replaced with --force alone
    ├── SchemaError            surgery.json is unreadable, of an unknown schema, or names what must not be named
    ├── CorruptFileError       a file is truncated or damaged
    └── KeyMismatchError       the tensors are not the ones that this surgery needs
```

A message says what was wrong (with the value), where (fqn or file) and what to do next.
"""

__all__ = [
    "AlreadyConvertedError",
    "AlreadyDeployedError",
    "ArmourError",
    "BenchmarkError",
    "CalibrationError",
    "CheckpointError",
    "ConversionError",
    "CorruptFileError",
    "DataError",
    "DiscoveryError",
    "DivergedError",
    "ExampleInputError",
    "ExportError",
    "FolderError",
    "HubOutageError",
    "HubUnreachableError",
    "InterruptedRunError",
    "KeyMismatchError",
    "LicenseError",
    "ModelError",
    "NoAttentionError",
    "NotFiniteError",
    "NotOursError",
    "NothingToConvertError",
    "NothingToDeployError",
    "OccupiedError",
    "PatternError",
    "PostconditionError",
    "PushError",
    "ResumeError",
    "SchemaError",
    "SpecializationError",
    "TeacherError",
    "TokenError",
    "TraceError",
    "TrainingError",
    "UnknownModelError",
    "UsageError",
]


_LONGEST = 900


class ArmourError(Exception):
    """Base of everything this package raises on purpose. Its message is one line of bounded length."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        # Names and values in a message may come from a file that nobody checked.
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 300]} ... {line[-290:]}")


class UsageError(ArmourError):
    """An option or argument has a value that is never right."""

    exit_code = 2


class ModelError(ArmourError):
    """MODEL could not be turned into a model."""


class UnknownModelError(ModelError):
    """No library knows the name."""


class HubUnreachableError(ModelError):
    """Weights or a config are not on this machine and the hub did not answer."""


class CheckpointError(ModelError):
    """A weights file is unreadable, unsafe, or belongs to another architecture."""


class DiscoveryError(ArmourError):
    """The model could not be examined."""


class ExampleInputError(DiscoveryError):
    """Nobody knows what to feed the model, or it failed on what it was fed."""


class NoAttentionError(DiscoveryError):
    """The model ran, and nothing in it is attention."""


class TraceError(ArmourError):
    """One attention module could not be followed; `convert` turns it into that site's reason."""


class ConversionError(ArmourError):
    """The model was examined and cannot be converted as asked."""


class NothingToConvertError(ConversionError):
    """No site fits the mode."""


class PatternError(ConversionError):
    """An include or exclude pattern matches no site."""


class AlreadyConvertedError(ConversionError):
    """The model went through surgery before."""


class AlreadyDeployedError(ConversionError):
    """The model went through `deploy` before: it is for inference, and nothing comes after that."""


class NothingToDeployError(ConversionError):
    """No pass of `deploy` found anything to do."""


class NotFiniteError(ConversionError):
    """A weight that a conversion has to read is NaN or infinite, or so large that products with it are."""


class CalibrationError(ConversionError):
    """The images to calibrate with are missing, unreadable, or not what the model takes."""


class PostconditionError(ConversionError):
    """A pass did not keep its promise. This is a bug of ours."""


class TrainingError(ArmourError):
    """Training or evaluating cannot start, go on, or end well."""


class DataError(TrainingError):
    """Images or labels are missing, unreadable, or not what the model takes."""


class TeacherError(TrainingError):
    """Nobody knows the teacher, or it does not fit the student."""


class DivergedError(TrainingError):
    """The loss is no number any more."""


class ResumeError(TrainingError):
    """There is no checkpoint to go on from, or it belongs to another run."""


class InterruptedRunError(TrainingError):
    """A signal stopped the run; a checkpoint was written before."""


class BenchmarkError(ArmourError):
    """A model does not compile or run as it is to be timed."""


class ExportError(ArmourError):
    """A format cannot hold the model, or what it holds does not compute what the model does."""


class SpecializationError(ArmourError):
    """A converted attention was called in a way that it cannot follow."""


class PushError(ArmourError):
    """A saved folder was not sent to the hub."""


class LicenseError(PushError):
    """The model card does not name the license of the base model, or another one than was given."""


class TokenError(PushError):
    """There is no token for the hub, or the hub does not let it write there."""


class HubOutageError(PushError):
    """The hub did not answer, or stopped in the middle; what arrived is not sent again."""


class FolderError(ArmourError):
    """A saved folder cannot be written or read."""


class NotOursError(FolderError):
    """The output path exists and was not written by this tool."""


class OccupiedError(FolderError):
    """The output path holds a trained model, or another one than is to be written."""


class SchemaError(FolderError):
    """`surgery.json` is unreadable, of an unknown schema, or names what must not be named."""


class CorruptFileError(FolderError):
    """A file is truncated or damaged."""


class KeyMismatchError(FolderError):
    """The tensors in the file are not the ones that this surgery needs."""
