"""The errors that are the user's to mend: each says the rule, the value received and the remedy."""


class MergetuneError(Exception):
    """An input, a file or the machine does not allow what was asked; the message says what to do."""


class TrialError(MergetuneError):
    """One candidate could not be measured; the study records the reason and goes on."""


class EngineError(TrialError):
    """The engine broke down while it measured: it must be started anew before it is used again."""


class StartError(MergetuneError):
    """An engine cannot be started with a model, or a server is not there."""
